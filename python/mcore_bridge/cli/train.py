"""mcore-bridge sft | pt."""

import dataclasses
import json
import math
import os
import re
import shutil
import time
from datetime import datetime
from pathlib import Path

from .arguments import TrainArguments, parse
from .launch import finish_distributed, init_distributed

# Flags that the engine's optimizer knows by the same name.
OPTIMIZER_OPTIONS = [
    "lr_mult", "weight_decay_incr_style", "start_weight_decay", "end_weight_decay", "optimizer", "sgd_momentum", "muon_momentum",
    "muon_split_qkv", "muon_use_nesterov", "muon_scale_mode", "muon_num_ns_steps", "muon_coefficient_type", "muon_fp32_matmul_prec",
    "muon_tp_mode", "muon_extra_scale_factor", "muon_scalar_optimizer", "use_distributed_optimizer", "data_parallel_sharding_strategy",
    "overlap_grad_reduce", "overlap_param_gather", "ddp_bucket_size", "main_grads_dtype", "main_params_dtype", "exp_avg_dtype",
    "exp_avg_sq_dtype", "optimizer_cpu_offload", "optimizer_offload_fraction", "initial_loss_scale", "min_loss_scale",
    "loss_scale_window", "hysteresis",
]  # fmt: skip


def _derived(arguments, command):
    """Defaults that depend on other flags, and combinations that make no sense."""
    if arguments.use_chat_template is None:
        arguments.use_chat_template = command == "sft"
    if arguments.loss_scale is None:
        arguments.loss_scale = "default" if command == "sft" else "all"
    if arguments.adapters:
        arguments.tuner_type = "lora"
        if len(arguments.adapters) > 1:
            raise ValueError("--adapters: one adapter at a time")
    if arguments.data_parallel_sharding_strategy is None and arguments.use_megatron_fsdp:
        arguments.data_parallel_sharding_strategy = "optim_grads_params"
    if not arguments.accumulate_allreduce_grads_in_fp32:
        arguments.main_grads_dtype = "bf16"
    if arguments.lr is None:
        arguments.lr = 1e-4 if arguments.tuner_type == "lora" else 1e-5
    if arguments.train_iters is None and arguments.num_train_epochs is None:
        arguments.num_train_epochs = 1
    if arguments.save_total_limit is not None and arguments.save_total_limit < 1:
        raise ValueError(f"save_total_limit {arguments.save_total_limit} must be at least 1")
    for name in ("save_steps", "logging_steps", "micro_batch_size", "global_batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} {getattr(arguments, name)} must be at least 1")
    if arguments.tuner_type == "lora" and arguments.perform_initialization:
        raise ValueError("an adapter needs real weights below it: --perform_initialization goes with --tuner_type full")
    if arguments.system and arguments.system.endswith(".txt") and os.path.isfile(arguments.system):
        arguments.system = Path(arguments.system).read_text(encoding="utf-8").strip()
    unknown = set(arguments.report_to) - {"tensorboard", "none"}
    if unknown:
        raise ValueError(f"--report_to {' '.join(sorted(unknown))} is not supported by this version (tensorboard, none)")
    if arguments.output_dir is None:
        arguments.output_dir = str(Path("megatron_output") / Path(arguments.model or "model").name)
    return arguments


def _shared(value):
    """Rank 0's value on every rank."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def _versioned(output_dir):
    """output_dir/vN-<time> with the next free N."""
    root = Path(output_dir)
    taken = [int(match[1]) for path in root.glob("v*-*") if (match := re.match(r"v(\d+)-", path.name))]
    return str(root / f"v{max(taken, default=-1) + 1}-{datetime.now():%Y%m%d-%H%M%S}")


def _freeze(models, arguments):
    """freeze_parameters and trainable_parameters, by Megatron name."""

    def matches(name, prefixes, pattern):
        return any(name.startswith(prefix) for prefix in prefixes) or bool(pattern and re.search(pattern, name))

    for model in models:
        for name, parameter in model.named_parameters():
            if matches(name, arguments.freeze_parameters, arguments.freeze_parameters_regex):
                parameter.requires_grad_(False)
            if matches(name, arguments.trainable_parameters, arguments.trainable_parameters_regex):
                parameter.requires_grad_(True)


class Run:
    """One training run, from arguments to the last checkpoint."""

    def __init__(self, arguments, folder):
        import mcore_bridge as mb

        self.arguments, self.folder = arguments, folder
        from .session import build_config, load_adapter

        self.config = build_config(
            arguments,
            folder,
            recompute_granularity=arguments.recompute_granularity,
            recompute_method=arguments.recompute_method,
            recompute_num_layers=arguments.recompute_num_layers,
            recompute_modules=arguments.recompute_modules,
            cpu_offloading=arguments.cpu_offloading,
            cpu_offloading_num_layers=arguments.cpu_offloading_num_layers,
            deterministic_mode=arguments.deterministic_mode,
        )
        self.state = mb.get_parallel_state()
        if arguments.deterministic_mode:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        mb.set_random_seed(arguments.seed)
        self.models = mb.get_mcore_model(self.config)
        if arguments.perform_initialization:
            self.config.bridge.initialize(self.models, seed=arguments.seed)
        else:
            self.config.bridge.load_weights(self.models, folder)
        self.lora = arguments.tuner_type == "lora"
        if arguments.adapters:
            load_adapter(self.models, self.config, arguments.adapters[0])
        elif self.lora:
            mb.add_lora(
                self.models,
                mb.LoraOptions(
                    r=arguments.lora_rank,
                    lora_alpha=arguments.lora_alpha,
                    lora_dropout=arguments.lora_dropout,
                    use_rslora=arguments.use_rslora,
                    target_modules=arguments.target_modules,
                    target_regex=arguments.target_regex,
                    modules_to_save=arguments.modules_to_save,
                    seed=arguments.seed,
                ),
            )
        _freeze(self.models, arguments)
        self._prepare_data()
        self._make_trainer(mb)

    def _prepare_data(self):
        from transformers import AutoTokenizer

        from ..data.prepare import load_units
        from ..data.sampler import Sampler
        from .session import sequence_multiples

        arguments = self.arguments
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        longest = self.config.max_position_embeddings or 8192
        self.max_length = arguments.max_length or min(longest, 8192)
        multiple, document_multiple = sequence_multiples(self.config, self.state)
        if len(tokenizer) > self.config.padded_vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {self.config.padded_vocab_size}")
        self.units, self.held_out = load_units(arguments, tokenizer, self.max_length, multiple, document_multiple)

        def sampler(units, shuffle, once=False):
            return Sampler(
                len(units), arguments.micro_batch_size, arguments.global_batch_size, self.state.dp_rank, self.state.dp_size,
                seed=arguments.data_seed, shuffle=shuffle, once=once,
            )  # fmt: skip

        self.sampler = sampler(self.units, arguments.train_dataloader_shuffle)
        self.eval_sampler = sampler(self.held_out, False, once=True) if self.held_out and arguments.eval_iters else None
        self.train_iters = arguments.train_iters or self.sampler.steps(arguments.num_train_epochs)

    def _make_trainer(self, mb):
        a = self.arguments
        warmup = a.lr_warmup_iters
        if a.lr_warmup_fraction is not None:
            warmup = int(a.lr_warmup_fraction * (a.lr_decay_iters or self.train_iters))
        self.trainer = mb.Trainer(
            self.models, lr=a.lr, min_lr=a.min_lr, lr_decay_style=a.lr_decay_style, lr_decay_iters=a.lr_decay_iters or 0,
            lr_warmup_iters=warmup, lr_warmup_init=a.lr_warmup_init, lr_wsd_decay_style=a.lr_wsd_decay_style,
            lr_wsd_decay_iters=a.lr_wsd_decay_iters or 0, train_iters=self.train_iters, weight_decay=a.weight_decay,
            clip_grad=a.clip_grad, adam_beta1=a.adam_beta1, adam_beta2=a.adam_beta2, adam_eps=a.adam_eps,
            calculate_per_token_loss=a.calculate_per_token_loss, **{name: getattr(a, name) for name in OPTIMIZER_OPTIONS},
        )  # fmt: skip

    def describe(self):
        s, a = self.state, self.arguments
        total = sum(p.numel() for model in self.models for p in model.parameters())
        trained = sum(p.numel() for model in self.models for p in model.parameters() if p.requires_grad)
        layout = f"TP {s.tp_size} x PP {s.pp_size} x CP {s.cp_size} x DP {s.dp_size}" + (
            " with sequence parallelism" if self.config.sequence_parallel else ""
        )
        kind = "packed rows" if a.packing else "samples"
        return (
            f"{self.config.hf_model_type}: {total:,} parameters on this rank, {trained:,} trained; {layout}; {self.config.params_dtype}\n"
            f"data: {len(self.units.samples):,} samples, {self.units.tokens:,} tokens, {len(self.units):,} {kind}; {self.train_iters} steps of "
            f"{a.global_batch_size}\n"
            f"TFLOP/s per process count 6 FLOPs per matrix weight and token ({'4: the base is frozen' if self.lora else 'forward and backward'}) and causal attention halved"
        )

    def train(self):
        from .progress import Progress, peak_tflops, train_flops
        from .session import peak_memory_gib

        a = self.arguments
        output_dir = _shared(_versioned(a.output_dir) if a.add_version else a.output_dir)
        self.output_dir = Path(output_dir)
        progress = Progress(output_dir, self.train_iters, a.report_to, self.describe())
        peak = peak_tflops()
        steps_per_epoch = self.sampler.steps(1)
        consumed, started = 0, time.monotonic()
        first_loss = result = None
        saved = None
        for step in range(self.train_iters):
            begin = time.monotonic()
            batches = [self.units.micro_batch(units) for units in self.sampler.micro_batches(step)]
            result = self.trainer.train_step(batches)
            seconds = time.monotonic() - begin
            first_loss = result.loss if first_loss is None else first_loss
            consumed += result.tokens
            lengths = [self._document_lengths(batch) for batch in batches]
            squares = sum(length**2 for row in lengths for length in row) * self.state.dp_size
            tflops = train_flops(self.config, result.tokens, squares, self.lora) / seconds / 1e12 / self.state.world_size
            record = dict(
                iteration=result.iteration, loss=result.loss, grad_norm=result.grad_norm, lr=result.lr,
                tokens_per_second=result.tokens / seconds, memory_gib=peak_memory_gib(), tflops=tflops, consumed_tokens=consumed,
                elapsed=time.monotonic() - started,
            )  # fmt: skip
            if peak:
                record["mfu"] = tflops / peak
            last = result.iteration == self.train_iters
            progress.step(record, show=last or result.iteration == 1 or result.iteration % a.logging_steps == 0)
            if self.eval_sampler and (last or result.iteration % (a.eval_steps or a.save_steps) == 0):
                progress.evaluated(result.iteration, self.evaluate())
            due = result.iteration % (steps_per_epoch if a.save_strategy == "epoch" else a.save_steps) == 0
            if last or due:
                saved = self.save(result.iteration)
                progress.say(f"saved {saved}")
        progress.close(
            dict(
                output_dir=str(self.output_dir),
                checkpoint=str(saved),
                train_iters=self.train_iters,
                first_loss=first_loss,
                last_loss=result.loss,
                tokens=consumed,
            )
        )

    @staticmethod
    def _document_lengths(batch):
        packed = batch.get("packed_seq_params")
        if packed is None:
            return [batch["input_ids"].shape[1]] * batch["input_ids"].shape[0]
        return packed.cu_seqlens.diff().tolist()

    def evaluate(self):
        """Mean loss over the validation data, each sample once: per token, or per micro-batch without calculate_per_token_loss."""
        a = self.arguments
        batches = math.ceil(len(self.held_out) / a.global_batch_size)
        if a.eval_iters > 0:
            batches = min(batches, a.eval_iters)
        total = count = 0
        for step in range(batches):
            mean = self.trainer.evaluate([self.held_out.micro_batch(units) for units in self.eval_sampler.micro_batches(step)])
            units = self.eval_sampler.global_batch(step)
            if a.calculate_per_token_loss:
                part = whole = self.held_out.loss_tokens(units)
            else:
                # The engine counts micro-batches without any loss as well, with loss 0.
                rows = [units[at : at + a.micro_batch_size] for at in range(0, len(units), a.micro_batch_size)]
                part, whole = sum(any(unit is not None for unit in row) for row in rows), len(rows)
            total += mean * whole
            count += part
        return total / count

    def save(self, iteration):
        from .session import side_files, tokenizer_files

        a, bridge = self.arguments, self.config.bridge
        target = self.output_dir / f"checkpoint-{iteration}"
        record = {"args.json": (json.dumps(dataclasses.asdict(a), indent=2) + "\n").encode()}
        leader = self.state.rank == 0
        if not self.lora:
            bridge.save_weights(
                self.models,
                target,
                max_shard_size=a.max_shard_size,
                extra_files={**side_files(self.folder, self.config, a.rope_scaling), **record} if leader else {},
            )
        else:
            content = bridge.peft_adapter_config(self.models, "default", str(a.model))
            files = {
                "adapter_config.json": (json.dumps(content, indent=2) + "\n").encode(),
                **tokenizer_files(self.folder),
                **record,
            }
            bridge.save_weights(self.models, target, peft_format=True, extra_files=files if leader else {})
            if a.merge_lora:
                merged = target.with_name(f"{target.name}-merged")
                bridge.save_weights(
                    self.models,
                    merged,
                    merge_lora=True,
                    max_shard_size=a.max_shard_size,
                    extra_files=side_files(self.folder, self.config, a.rope_scaling) if leader else {},
                )
        if a.save_total_limit and leader:
            steps = sorted(
                (int(match[1]), path)
                for path in self.output_dir.glob("checkpoint-*")
                if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
            )
            for _, path in steps[: -a.save_total_limit]:
                shutil.rmtree(path)
                shutil.rmtree(path.with_name(f"{path.name}-merged"), ignore_errors=True)
        return target


def run(command, argv):
    arguments = _derived(parse(TrainArguments, command, argv), command)
    from .session import resolve_model

    init_distributed()
    folder = resolve_model(arguments.model)
    Run(arguments, folder).train()
    finish_distributed()
    return 0
