"""Flags: a dataclass field is a flag, its type, default, help and choices; nothing is written twice."""

import argparse
import dataclasses
import difflib
import json
import os
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Dict, List, Literal, Optional

from .original_flags import NEUTRAL

Strings = List[str]


def flag(default, text, section=None, choices=None):
    """A field with a default, its help text, the section it opens in --help, and its allowed values."""
    metadata = dict(help=text, section=section, choices=choices)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelArguments:
    model: Optional[str] = flag(None, "Hugging Face folder or hub id", "Model and weights")
    adapters: Strings = flag([], "PEFT adapter folder to start from (one)")
    mcore_model: Optional[str] = flag(None, "Megatron torch_dist checkpoint to take the weights from (sft, pt, export --to_hf)")
    torch_dtype: Optional[str] = flag(
        None, "dtype of the weights; default: config.json's", choices=["float32", "bfloat16", "float16"]
    )
    max_shard_size: str = flag("5GB", "largest safetensors file, e.g. 5GB, 500MB, 2GiB")
    rope_scaling: Optional[Dict[str, Any]] = flag(None, "JSON: replaces the model's RoPE scaling")
    megatron_extra_kwargs: Dict[str, Any] = flag({}, "JSON: further ModelConfig fields, last word")
    output_dir: Optional[str] = flag(None, "where results go; default: megatron_output/<model name>")

    tensor_model_parallel_size: int = flag(1, "processes a matrix is split over", "Parallelism")
    pipeline_model_parallel_size: int = flag(1, "processes the layers are split over")
    context_parallel_size: int = flag(1, "processes a sequence is split over")
    cp_comm_type: Literal["p2p", "all_gather", "a2a"] = flag(
        "p2p", "how keys and values reach the processes of a sequence: around a ring, all to all, or heads are split instead"
    )
    expert_model_parallel_size: int = flag(1, "processes the experts are split over")
    expert_tensor_parallel_size: int = flag(1, "processes each expert's matrices are split over")
    virtual_pipeline_model_parallel_size: Optional[int] = flag(None, "chunks of layers per pipeline process (interleaved)")
    num_layers_per_virtual_pipeline_stage: Optional[int] = flag(None, "instead: layers of one chunk")
    microbatch_group_size_per_vp_stage: Optional[int] = flag(None, "micro-batches a chunk takes in a row; default: pipeline size")
    pipeline_model_parallel_layout: Optional[str] = flag(
        None, "what each stage holds, e.g. Et*3|(tt|)*2tL: E embedding, t layer, L loss, | next stage"
    )
    pipeline_schedule: Literal["1f1b", "interleaved", "zb-h1"] = flag(
        "1f1b", "order of work; 1f1b with virtual stages is interleaved; zb-h1 fills the bubble with weight gradients"
    )
    sequence_parallel: bool = flag(False, "split activations along the sequence over the tensor-parallel processes")
    tp_comm_overlap: bool = flag(False, "pipeline the gathers and reductions of sequence_parallel with the matrix products")
    decoder_first_pipeline_num_layers: Optional[int] = flag(None, "layers of the first stage when uneven")
    decoder_last_pipeline_num_layers: Optional[int] = flag(None, "layers of the last stage when uneven")
    account_for_embedding_in_pipeline_split: bool = flag(False, "count the embedding as a layer")
    account_for_loss_in_pipeline_split: bool = flag(False, "count the output layer as a layer")
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = flag(
        "alltoall", "how tokens reach their experts; allgather: more traffic, no wait for the device", "Mixture of experts"
    )
    moe_router_dtype: Literal["none", "fp32", "fp64"] = flag("fp32", "precision of the router's product; none: of the weights")
    moe_router_load_balancing_type: Strings = flag(
        ["aux_loss"], "one or more of aux_loss seq_aux_loss global_aux_loss, or sinkhorn, or none"
    )
    moe_aux_loss_coeff: List[float] = flag([0.0], "weight of the balance loss; one number, or one for each type")
    moe_z_loss_coeff: Optional[float] = flag(None, "weight of the router's z loss")
    moe_expert_capacity_factor: Optional[float] = flag(
        None, "an expert takes at most so many times its even share of the tokens; default: all of them"
    )
    moe_token_drop_policy: Literal["probs", "position"] = flag("probs", "what a full expert drops: small weights, or late tokens")
    moe_pad_expert_input_to_capacity: bool = flag(False, "every expert gets exactly its capacity, filled up with zeros")


@dataclass
class TrainArguments(ModelArguments):
    dataset: Strings = flag([], "files (jsonl, json, csv, parquet, txt) or hub ids; NAME#500 takes 500 rows", "Data")
    val_dataset: Strings = flag([], "validation data")
    split_dataset_ratio: float = flag(0.0, "share of the training data held out for validation")
    max_length: Optional[int] = flag(None, "longest sample in tokens; default: the model's max_position_embeddings, at most 8192")
    truncation_strategy: Literal["delete", "left", "right"] = flag("delete", "what happens to longer samples")
    packing: bool = flag(False, "pack whole samples into rows of packing_length without padding")
    packing_length: Optional[int] = flag(None, "tokens of a packed row; default: max_length")
    padding_free: bool = flag(True, "flatten a micro-batch into one row instead of padding it")
    dataset_shuffle: bool = flag(True, "shuffle the rows once")
    train_dataloader_shuffle: bool = flag(True, "shuffle the samples anew every epoch")
    dataset_num_proc: int = flag(1, "processes that tokenise")
    interleave_prob: Strings = flag([], "share of each dataset in the mixture, e.g. 0.7 0.3; default: one after the other")
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = flag(
        "first_exhausted", "an interleaved epoch ends when the first dataset runs out, or starts it over until all have"
    )
    streaming: bool = flag(False, "read and tokenise while training instead of before; needs train_iters")
    shuffle_buffer_size: int = flag(1000, "streamed rows that are shuffled (and packed) among themselves")
    dataloader_num_workers: int = flag(1, "threads that prepare batches ahead of the training; 0: none")
    dataloader_prefetch_factor: int = flag(2, "global batches each of them prepares ahead")
    dataloader_pin_memory: bool = flag(True, "in page-locked memory, from which they go to a GPU without holding up the host")
    data_seed: int = flag(42, "seed of the data order")
    columns: Dict[str, str] = flag({}, 'JSON: rename columns, e.g. {"question": "query"}')
    strict: bool = flag(False, "a row that cannot be read is an error instead of being dropped with a warning")
    system: Optional[str] = flag(None, "system message for rows without one, or a .txt file that holds it")
    use_chat_template: Optional[bool] = flag(None, "render rows with the tokenizer's chat template (sft: true, pt: false)")
    loss_scale: Optional[Literal["default", "last_round", "all"]] = flag(
        None, "tokens that carry loss: all assistant turns, the last one, everything (sft: default, pt: all)"
    )

    micro_batch_size: int = flag(1, "samples (or packed rows) per forward and data-parallel rank", "Batch and steps")
    global_batch_size: int = flag(16, "samples (or packed rows) per optimizer step over all ranks")
    train_iters: Optional[int] = flag(None, "optimizer steps; default: from num_train_epochs")
    num_train_epochs: Optional[float] = flag(None, "passes over the data (default 1 without train_iters)")
    seed: int = flag(42, "seed of adapters, random weights and dropout")
    recompute_granularity: Literal["none", "selective", "full"] = flag(
        "none",
        "full: keep only the layers' inputs and compute the rest again in backward (less memory, about a third more work); "
        "selective: only what recompute_modules names",
    )
    recompute_modules: Strings = flag([], "for selective: core_attn (the default), mlp, layernorm")
    recompute_method: Optional[Literal["uniform", "block"]] = flag(
        None, "every recompute_num_layers layers together, or only the first ones"
    )
    recompute_num_layers: Optional[int] = flag(None, "layers of a unit (uniform) or recomputed per stage (block)")
    cpu_offloading: bool = flag(False, "keep activations of some layers in host memory until backward")
    cpu_offloading_num_layers: int = flag(0, "the first so many layers of a stage")
    fp8_format: Optional[Literal["e4m3", "hybrid"]] = flag(
        None, "the decoder's linear layers compute in FP8 (docs/fp8.md); hybrid: their gradients in e5m2"
    )
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise"] = flag(
        "delayed", "scales: each tensor's own largest magnitude; those of the steps before; 1 x 128 and 128 x 128 blocks (Hopper)"
    )
    fp8_amax_history_len: int = flag(1024, "delayed: steps looked back on")
    fp8_amax_compute_algo: Literal["max", "most_recent"] = flag("max", "delayed: largest of them, or the last")
    fp8_param_gather: bool = flag(
        False, "with fp8_format: weights are kept in memory as FP8 alone; those that train have fp32 masters"
    )
    first_last_layers_bf16: bool = flag(False, "with fp8_format: the first and last layer compute in torch_dtype")
    num_layers_at_start_in_bf16: int = flag(1, "so many at the start")
    num_layers_at_end_in_bf16: int = flag(1, "so many at the end")
    deterministic_mode: bool = flag(False, "the same bits in every run on GPUs too, at some speed")
    calculate_per_token_loss: bool = flag(True, "every token of the global batch counts alike (false: every micro-batch)")

    lr: Optional[float] = flag(None, "peak learning rate; default 1e-5 full, 1e-4 LoRA", "Optimizer and learning rate")
    min_lr: float = flag(0.0, "its floor")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = flag(
        "cosine", "shape of the schedule"
    )
    lr_decay_iters: Optional[int] = flag(None, "steps of the decay; default: train_iters")
    lr_warmup_iters: int = flag(0, "steps of linear warm-up")
    lr_warmup_fraction: Optional[float] = flag(None, "the same as a share of the decay steps")
    lr_warmup_init: float = flag(0.0, "where the warm-up starts")
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = flag("exponential", "tail of WSD")
    lr_wsd_decay_iters: Optional[int] = flag(None, "steps of the tail")
    lr_mult: Dict[str, float] = flag({}, 'JSON: factors of lr by regular expression over names, e.g. {"embedding": 0.1}')
    weight_decay: float = flag(0.1, "decoupled; not applied to norms and biases")
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = flag("constant", "how it grows over the run")
    start_weight_decay: Optional[float] = flag(None, "where linear and cosine start")
    end_weight_decay: Optional[float] = flag(None, "where they end")
    clip_grad: float = flag(1.0, "largest gradient norm; 0: no clipping")
    adam_beta1: float = flag(0.9, "AdamW")
    adam_beta2: float = flag(0.95, "AdamW")
    adam_eps: float = flag(1e-8, "AdamW")
    optimizer: Literal["adam", "sgd", "muon", "dist_muon"] = flag(
        "adam", "AdamW; SGD with momentum; Muon for matrices and AdamW for the rest"
    )
    sgd_momentum: float = flag(0.9, "SGD")
    muon_momentum: float = flag(0.9, "Muon")
    muon_split_qkv: bool = flag(True, "orthogonalise q, k, v (and gate, up) each for itself")
    muon_use_nesterov: bool = flag(False, "Nesterov momentum")
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = flag(
        "spectral", "size of an update by the matrix's shape"
    )
    muon_num_ns_steps: int = flag(5, "Newton-Schulz iterations")
    muon_coefficient_type: Literal["simple", "quintic", "polar_express"] = flag("quintic", "their coefficients")
    muon_fp32_matmul_prec: Literal["medium", "high", "highest"] = flag("medium", "their products: bf16, TF32, fp32")
    muon_tp_mode: Literal["blockwise", "distributed", "duplicated"] = flag(
        "blockwise", "matrices split over TP: each block alone; whole, products summed over ranks; whole, on every rank"
    )
    muon_extra_scale_factor: float = flag(1.0, "further factor of Muon's updates")
    muon_scalar_optimizer: Literal["adam", "sgd"] = flag("adam", "for vectors, embeddings and output layers under Muon")

    use_distributed_optimizer: bool = flag(
        True, "optimizer states and updates shared out over the data-parallel ranks", "Distributed optimizer and precision"
    )
    use_megatron_fsdp: bool = flag(False, "shard what data_parallel_sharding_strategy says")
    data_parallel_sharding_strategy: Optional[Literal["no_shard", "optim", "optim_grads", "optim_grads_params"]] = flag(
        None, "what data-parallel ranks share out (ZeRO-0 to 3); default: optim, with use_megatron_fsdp optim_grads_params"
    )
    overlap_grad_reduce: bool = flag(False, "reduce gradients while backward goes on")
    overlap_param_gather: bool = flag(False, "gather updated parameters while forward goes on")
    ddp_bucket_size: int = flag(40_000_000, "elements of a bucket that is reduced as one")
    accumulate_allreduce_grads_in_fp32: bool = flag(True, "false: as main_grads_dtype bf16")
    main_grads_dtype: Literal["fp32", "bf16"] = flag("fp32", "gradients are added up and reduced in it")
    main_params_dtype: Literal["fp32", "bf16"] = flag("fp32", "bf16: no fp32 master weights (less memory, less exact)")
    store_param_remainders: bool = flag(
        False, "bfloat16: an fp32 master is the weight and the 16 bits it lacks, 2 bytes less a weight"
    )
    exp_avg_dtype: Literal["fp32", "bf16", "fp16"] = flag("fp32", "first moment (or momentum)")
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = flag("fp32", "second moment")
    optimizer_cpu_offload: bool = flag(False, "keep optimizer states in host memory and update there")
    optimizer_offload_fraction: float = flag(1.0, "the share of them")
    cuda_graph_impl: Literal["none", "local"] = flag(
        "none", "local: a micro-batch's forward and backward become one CUDA graph for each shape that comes back"
    )
    cuda_graph_warmup_steps: int = flag(3, "micro-batches of a shape before it is recorded")
    initial_loss_scale: float = flag(4294967296.0, "float16: first factor on the loss")
    min_loss_scale: float = flag(1.0, "float16: smallest one")
    loss_scale_window: int = flag(1000, "float16: good steps before it doubles")
    hysteresis: int = flag(2, "float16: overflows before it halves")

    tuner_type: Literal["full", "lora"] = flag("full", "train everything or an adapter", "Tuning")
    target_modules: Strings = flag(["all-linear"], "layers the adapter goes to: all-linear, linear_qkv, q_proj, ...")
    target_regex: Optional[str] = flag(None, "instead: a regular expression over whole module names")
    modules_to_save: Strings = flag([], "further modules trained in full, e.g. embed_tokens lm_head")
    lora_rank: int = flag(8, "rank r")
    lora_alpha: float = flag(32, "scaling: alpha / r")
    lora_dropout: float = flag(0.05, "dropout in front of A")
    use_rslora: bool = flag(False, "scale by alpha / sqrt(r)")
    freeze_parameters: Strings = flag([], "parameter names (prefixes) that stay as they are")
    freeze_parameters_regex: Optional[str] = flag(None, "the same as a regular expression searched in names")
    trainable_parameters: Strings = flag([], "prefixes that train in spite of freezing")
    trainable_parameters_regex: Optional[str] = flag(None, "the same as a regular expression")
    perform_initialization: bool = flag(False, "start from random weights (model then only needs config.json and a tokenizer)")

    add_version: bool = flag(True, "put results into output_dir/vN-<time>", "Saving and logging")
    save_steps: int = flag(500, "checkpoint every so many steps, and at the end")
    save_strategy: Literal["steps", "epoch"] = flag("steps", "or at the end of every epoch")
    save_total_limit: Optional[int] = flag(None, "keep so many checkpoints: the last ones and (from 2 on) the best")
    metric_for_best_model: Literal["loss"] = flag("loss", "the validation loss, or the training loss without validation data")
    greater_is_better: bool = flag(False, "whether more of it is better")
    create_checkpoint_symlink: bool = flag(False, "links `best` and `last` beside the checkpoints")
    async_save: bool = flag(False, "training waits only for the copy to host memory; files are written behind its back")
    no_save_optim: bool = flag(False, "leave the optimizer's state out of checkpoints")
    no_save_rng: bool = flag(False, "leave the random number generators' states out")
    resume_from_checkpoint: Optional[str] = flag(
        None, "go on from a checkpoint folder, from the newest one of a run's folder, or (auto) of output_dir if there is any"
    )
    finetune: Optional[bool] = flag(None, "of the checkpoint take weights and optimizer only: step 0, data from the start")
    no_load_optim: bool = flag(False, "resume with a fresh optimizer")
    no_load_rng: bool = flag(False, "resume with freshly seeded random number generators")
    merge_lora: bool = flag(False, "write checkpoint-N-merged beside each adapter")
    logging_steps: int = flag(5, "steps per log line")
    eval_steps: Optional[int] = flag(None, "steps between evaluations; default: save_steps")
    eval_iters: int = flag(-1, "global batches per evaluation; -1: all, 0: none")
    report_to: Strings = flag(["tensorboard"], "tensorboard, wandb, swanlab or none")
    tensorboard_dir: Optional[str] = flag(None, "default: output_dir/runs")
    wandb_project: Optional[str] = flag(None, "default: megatron-swift")
    wandb_exp_name: Optional[str] = flag(None, "default: output_dir")
    swanlab_project: Optional[str] = flag(None, "default: megatron-swift")
    swanlab_exp_name: Optional[str] = flag(None, "default: output_dir")
    profile: Optional[str] = flag(None, "steps to profile, FIRST-LAST: a Chrome trace per rank in output_dir/profile")

    on_nonfinite: Literal["stop", "skip"] = flag(
        "stop", "a NaN or Inf in loss or gradients: save and stop, or skip the step", "Guards"
    )
    loss_spike_threshold: float = flag(
        8.0, "a loss so many robust standard deviations above the recent ones is a spike; 0: none is"
    )
    on_loss_spike: Literal["warn", "skip", "stop"] = flag(
        "warn", "what a spike does: skip updates nothing (it is recorded in bad_batches.jsonl anyway)"
    )
    distributed_timeout_minutes: int = flag(30, "a collective operation that takes longer is an error")


@dataclass
class PlanArguments(TrainArguments):
    """Every training flag has its meaning; sizes that are not given are searched."""

    tensor_model_parallel_size: Optional[int] = flag(None, "processes a matrix is split over; default: searched", "Parallelism")
    pipeline_model_parallel_size: Optional[int] = flag(None, "processes the layers are split over; default: searched")
    context_parallel_size: Optional[int] = flag(None, "processes a sequence is split over; default: searched")
    expert_model_parallel_size: Optional[int] = flag(
        None, "processes the experts are split over (an even load of them is counted); default: searched"
    )
    sequence_parallel: Optional[bool] = flag(None, "split activations along the sequence; default: with tensor parallelism")
    micro_batch_size: Optional[int] = flag(None, "rows per forward and data-parallel rank; default: searched")
    recompute_granularity: Optional[str] = flag(None, "what backward computes again; default: searched", choices=["none", "full"])

    gpus: Optional[int] = flag(None, "GPUs (processes) there are", "Plan")
    gpu_memory: Optional[str] = flag(None, "memory of one, e.g. 80GiB; default: the hardware's")
    hardware: str = flag("h100", "row of the hardware table (h100, h200, h800, h20, b200, a100, a800, a100-40g, l40s)")
    peak_tflops: Optional[float] = flag(None, "dense bfloat16 TFLOP/s instead of the table's")
    memory_bandwidth: Optional[float] = flag(None, "GB/s of the GPU's memory instead of the table's")
    link_bandwidth: Optional[float] = flag(None, "GB/s to a GPU of the same node, one direction")
    network_bandwidth: Optional[float] = flag(None, "GB/s to a GPU of another node, one direction")
    gpus_per_node: Optional[int] = flag(None, "GPUs of one node (default: 8)")
    matmul_efficiency: Optional[float] = flag(None, "share of the peak that matrix products reach (default: 0.7)")
    documents_per_row: int = flag(1, "documents of a packed row, which attention keeps apart")
    top: int = flag(5, "layouts to show")
    explain: bool = flag(False, "print the formulae of the best layout with its numbers")
    json: bool = flag(False, "print JSON")


@dataclass
class ExportArguments(ModelArguments):
    merge_lora: bool = flag(False, "write W + scaling * B A", "Export")
    dequantize: bool = flag(False, "write FP8 and MXFP4 weights as plain ones (in torch_dtype, default bfloat16)")
    quantize: Optional[Literal["fp8", "mxfp4"]] = flag(
        None, "fp8: linear layers in blocks of 128 x 128; mxfp4: stacked experts as gpt-oss has them"
    )
    to_mcore: bool = flag(False, "write a Megatron torch_dist checkpoint from --model")
    to_hf: bool = flag(False, "write a Hugging Face folder from --mcore_model")
    test_convert_precision: bool = flag(
        False, "after to_mcore or to_hf: compare the logits of both sides; exits 1 when they differ"
    )
    test_convert_dtype: Literal["float32", "bfloat16", "float16"] = flag("float32", "dtype of that comparison")
    exist_ok: bool = flag(False, "replace the weights in an existing output_dir")


@dataclass
class VerifyArguments(ModelArguments):
    tolerance: Optional[float] = flag(
        None, "largest relative difference of logits; default 2e-5 (float32), 2e-2 otherwise", "Verify"
    )
    text: Strings = flag([], "texts to compare on; default: random tokens")
    length: int = flag(64, "tokens of each random sequence")
    batch: int = flag(2, "random sequences")
    seed: int = flag(42, "of the random tokens")


@dataclass
class ScheduleArguments:
    pipeline_model_parallel_size: int = flag(4, "stages", "Schedule")
    virtual_pipeline_model_parallel_size: Optional[int] = flag(None, "chunks per stage (interleaved)")
    micro_batches: int = flag(8, "micro-batches per step")
    microbatch_group_size_per_vp_stage: Optional[int] = flag(None, "micro-batches a chunk takes in a row; default: stages")
    pipeline_schedule: Literal["1f1b", "interleaved", "zb-h1"] = flag("1f1b", "order of work")
    forward_cost: float = flag(1.0, "time of a forward of one chunk, any unit", "Costs")
    backward_input_cost: float = flag(1.0, "time of its gradient of the input")
    backward_weight_cost: float = flag(1.0, "time of its gradient of the weights")
    exchange_cost: float = flag(0.0, "time of a message between stages")
    table: bool = flag(False, "also print the table itself, messages included", "Output")
    plot: Optional[str] = flag(None, "draw the chart into this file (png, svg, pdf)")


@dataclass
class DiffArguments:
    models: Strings = flag([], "two folders or safetensors files (also as the first two arguments)", "Diff")
    dequantize: bool = flag(False, "compare FP8 and MXFP4 weights by the values they stand for")
    tolerance: float = flag(0.0, "largest |a - b| / |a| of a tensor that counts as equal; 0: the same values bit for bit")
    json: bool = flag(False, "print JSON")
    all: bool = flag(False, "list equal tensors too")


@dataclass
class InspectArguments:
    model: Optional[str] = flag(None, "folder or safetensors file (also as the first argument)", "Inspect")
    json: bool = flag(False, "print JSON")
    names: bool = flag(False, "list every tensor instead of the repeated layers once")


def boolean(text):
    if str(text).lower() in ("true", "1", "yes"):
        return True
    if str(text).lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def dictionary(text):
    if isinstance(text, dict):
        return text
    if os.path.isfile(text):
        with open(text, encoding="utf-8") as file:
            text = file.read()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"'{text}' is no JSON object")
    return value


def _kind(annotation):
    """(converter, is a list, choices) of a field's type."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _kind(next(item for item in inner if item is not type(None)))
    if origin is list:
        return str, True, None
    if origin is dict:
        return dictionary, False, None
    if origin is Literal:
        return str, False, list(inner)
    return (boolean if annotation is bool else annotation), False, None


class _Parser(argparse.ArgumentParser):
    """Argument errors become ValueError, so that they end like every other mistake."""

    def error(self, message):
        raise ValueError(message)


def parser(arguments_class, command):
    """The argparse parser of a command, sections and all."""
    result = _Parser(
        prog=f"mcore-bridge {command}",
        usage=f"mcore-bridge {command} [config.yaml] [--flag value ...]",
        description="A YAML or JSON file of the same flags may come first; its ENV map sets environment variables that are not set. "
        "Lists are separated by spaces, dictionaries are JSON, booleans are true or false.",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(arguments_class)
    group = result
    for item in dataclasses.fields(arguments_class):
        if item.metadata.get("section"):
            group = result.add_argument_group(item.metadata["section"])
        convert, many, choices = _kind(hints[item.name])
        choices = item.metadata.get("choices") or choices
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
        shown = (
            ""
            if default is None or default == [] or default == {}
            else f" (default: {str(default).lower() if isinstance(default, bool) else default})"
        )
        options = dict(type=convert, default=argparse.SUPPRESS, help=item.metadata["help"].replace("%", "%%") + shown)
        if many:
            options["nargs"] = "*"
        if choices:
            options["choices"] = choices
        else:
            options["metavar"] = {boolean: "BOOL", dictionary: "JSON"}.get(convert, getattr(convert, "__name__", "").upper())
        group.add_argument(f"--{item.name}", **options)
    return result


def _file_values(path):
    """Flags of a YAML or JSON file; its ENV map is exported first."""
    with open(path, encoding="utf-8") as file:
        if path.endswith(".json"):
            values = json.load(file)
        else:
            import yaml

            values = yaml.safe_load(file)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds no map of flags")
    for name, value in (values.pop("ENV", None) or {}).items():
        os.environ.setdefault(str(name), str(value))
    return values


def _as_words(values):
    """A file's values as a command line, so that both are checked alike."""
    words = []
    for name, value in values.items():
        if value is None:
            continue
        words.append(f"--{name}")
        if isinstance(value, bool):
            words.append(str(value).lower())
        elif isinstance(value, dict):
            words.append(json.dumps(value))
        elif isinstance(value, (list, tuple)):
            words.extend(str(item) for item in value)
        else:
            words.append(str(value))
    return words


def _check_unknown(words, known):
    """Errors for flags this version does not have; neutral values of known ones pass."""
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not word.startswith("--"):
            raise ValueError(f"'{word}' is no flag; flags start with --")
        name, joined, value = word[2:].partition("=")
        values = [value] if joined else []
        while at < len(words) and not words[at].startswith("--"):
            values.append(words[at])
            at += 1
        if name not in NEUTRAL:
            near = difflib.get_close_matches(name, [*known, *NEUTRAL], n=1)
            raise ValueError(f"--{name} is no flag" + (f"; did you mean --{near[0]}?" if near else "; see --help"))
        accepted = NEUTRAL[name]
        given = values[0] if len(values) == 1 else " ".join(values)
        if accepted is not None and given.lower() not in [str(item).lower() for item in accepted] + ["none", "null", ""]:
            allowed = ", ".join(str(item).lower() for item in accepted) or "leave it out"
            raise ValueError(f"--{name} {given} is not supported by this version ({allowed})")


def parse(arguments_class, command, argv):
    """The dataclass filled from a command line. ValueError names a bad flag or value."""
    argv = list(argv)
    words = []
    if argv and argv[0].lower().endswith((".yaml", ".yml", ".json")) and not argv[0].startswith("-"):
        words = _as_words(_file_values(argv.pop(0)))
    built = parser(arguments_class, command)
    known = {item.name for item in dataclasses.fields(arguments_class)}
    namespace, unknown = built.parse_known_args([*words, *argv])
    _check_unknown(unknown, known)
    return arguments_class(**vars(namespace))
