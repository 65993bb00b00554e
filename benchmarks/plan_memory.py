"""The planner's memory beside what training allocates: `python benchmarks/plan_memory.py`, or under torchrun for more ranks.

On the CPU an allocator counts what tensors take; on a GPU torch.cuda's counters do. Weights, gradients and optimizer states must
agree exactly; activations and temporaries ("step") within 10%. `--cases NAME ...` picks cases, `--scale N` widens the model,
`--json FILE` writes the numbers."""

import argparse
import json
import os
from pathlib import Path

import mcore_bridge as mb
import torch
from mcore_bridge.engine import _core

MODEL = dict(
    num_layers=8,
    hidden_size=256,
    ffn_hidden_size=704,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=32,
    padded_vocab_size=4000,
    hf_model_type="llama",
)
LORA = dict(r=8, lora_dropout=0.05)
BF16 = dict(params_dtype="bfloat16")
TIED = dict(untie_embeddings_and_output_weights=False)
TP = dict(tensor_model_parallel_size=2)
SP = dict(TP, sequence_parallel=True)
PP = dict(pipeline_model_parallel_size=2)
CP = dict(context_parallel_size=2)
FULL = dict(recompute_granularity="full")
# Experts of equal loads, on every layer.
MOE = dict(
    hf_model_type="qwen3_moe",
    num_moe_experts=8,
    moe_router_topk=2,
    moe_ffn_hidden_size=256,
    moe_router_force_load_balancing=True,
    expert_tensor_parallel_size=1,
)
EP = dict(MOE, expert_model_parallel_size=2)
ETP = dict(expert_tensor_parallel_size=2)
SHARED = dict(hf_model_type="qwen2_moe", moe_shared_expert_intermediate_size=256, moe_shared_expert_gate=True)
BALANCED = dict(
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_load_balancing_type=["aux_loss", "seq_aux_loss", "global_aux_loss"],
    moe_aux_loss_coeff=[1e-3, 1e-3, 1e-3],
)
FP32_ROUTER = dict(BF16, moe_router_weight_in_fp32=True)
# Attention that keeps its scores, and they are most of what there is.
SCORES = dict(padded_vocab_size=500, num_layers=2, attention_dropout=0.1)
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["moe"])


def case(processes=1, fields=None, *, lora=None, rows=2, length=256, micro_batches=2, documents=1, **optimizer):
    """`documents` of equal length make a packed row; `optimizer`: Trainer options."""
    return dict(
        processes=processes, fields=fields or {}, lora=lora, rows=rows, length=length, micro_batches=micro_batches,
        documents=documents, optimizer=optimizer,
    )  # fmt: skip


FP8_PARAM = dict(BF16, fp8="hybrid", fp8_recipe="tensorwise", fp8_param=True)
CASES = {
    "full": case(),
    "full_bf16": case(1, BF16),
    "full_bf16_remainders": case(1, BF16, store_param_remainders=True),
    "full_tied": case(1, {**TIED, **BF16}),
    "full_long": case(1, dict(padded_vocab_size=500), rows=1, length=1024, micro_batches=1),
    "packed": case(rows=1, length=512, documents=4),
    "full_recompute": case(1, FULL),
    "full_recompute_units": case(1, dict(FULL, recompute_num_layers=4)),
    "selective_mlp": case(1, dict(BF16, recompute_granularity="selective", recompute_modules=["mlp"])),
    "offload": case(1, dict(BF16, cpu_offloading=True, cpu_offloading_num_layers=6)),
    "offload_mlp": case(
        1, dict(cpu_offloading=True, cpu_offloading_num_layers=8, recompute_granularity="selective", recompute_modules=["mlp"])
    ),
    "offload_long": case(
        1, dict(padded_vocab_size=500, cpu_offloading=True, cpu_offloading_num_layers=6), rows=1, length=1024, micro_batches=1
    ),
    "attention_dropout": case(1, dict(attention_dropout=0.1)),
    "attention_dropout_again": case(1, dict(BF16, attention_dropout=0.1, recompute_granularity="selective")),
    "attention_dropout_long": case(1, SCORES, rows=1, length=1024, micro_batches=1),
    "attention_dropout_long_again": case(
        1, dict(SCORES, **BF16, recompute_granularity="selective"), rows=1, length=1024, micro_batches=1
    ),
    "window": case(1, dict(window_size=[64, 0])),
    "qk_norm": case(1, dict(BF16, qk_layernorm=True)),
    "lora": case(lora=LORA),
    "lora_bf16": case(1, BF16, lora=LORA),
    "lora_long": case(1, dict(padded_vocab_size=500), lora=LORA, rows=1, length=1024, micro_batches=1),
    "lora_recompute": case(1, {**FULL, **BF16}, lora=LORA),
    "tp2": case(2, TP),
    "tp2_bf16": case(2, {**TP, **BF16}),
    "tp2_lora": case(2, TP, lora=LORA),
    "tp2_qk_norm": case(2, dict(TP, qk_layernorm=True)),
    "tp2_recompute": case(2, {**TP, **FULL}),
    "tp2_sp": case(2, SP),
    "tp2_sp_bf16": case(2, {**SP, **BF16}),
    "tp2_sp_lora": case(2, SP, lora=LORA),
    "tp2_sp_overlap": case(2, dict(SP, tp_comm_overlap=True)),
    "tp2_sp_recompute": case(2, {**SP, **FULL}),
    "tp2_sp_selective_mlp": case(2, dict(SP, recompute_granularity="selective", recompute_modules=["mlp"])),
    "cp2": case(2, CP),
    "cp2_packed": case(2, dict(CP, **BF16), rows=1, length=512, documents=4),
    "cp2_gather": case(2, dict(CP, cp_comm_type="all_gather")),
    "cp2_a2a": case(2, dict(CP, cp_comm_type="a2a")),
    "cp2_a2a_packed": case(2, dict(CP, cp_comm_type="a2a", qk_layernorm=True), rows=1, length=512, documents=4),
    "cp2_a2a_dropout": case(2, dict(CP, cp_comm_type="a2a", attention_dropout=0.1)),
    "cp2_recompute": case(2, {**CP, **FULL}),
    "cp2_lora": case(2, CP, lora=LORA),
    "pp2": case(2, PP, micro_batches=4),
    "pp2_bf16": case(2, {**PP, **BF16}, micro_batches=4),
    "pp2_tied": case(2, {**PP, **TIED}, micro_batches=4),
    "pp2_recompute": case(2, {**PP, **FULL}, micro_batches=4),
    "pp2_vpp2": case(2, dict(PP, virtual_pipeline_model_parallel_size=2), micro_batches=4),
    "pp2_layout": case(2, dict(PP, pipeline_model_parallel_layout="Et*3|t*2|t|t*2L"), micro_batches=4),
    "pp2_zb": case(2, dict(PP, pipeline_schedule="zb-h1"), micro_batches=4),
    "fp8_param": case(1, FP8_PARAM),
    "dp2_fp8_param": case(2, FP8_PARAM),
    "dp2": case(2),
    "dp2_overlap": case(2, overlap_grad_reduce=True, overlap_param_gather=True),
    "dp2_unsharded": case(2, BF16, use_distributed_optimizer=False),
    "dp2_grads": case(2, BF16, data_parallel_sharding_strategy="optim_grads"),
    "dp2_sharded": case(2, BF16, data_parallel_sharding_strategy="optim_grads_params"),
    "tp2_pp2": case(4, {**SP, **PP}, micro_batches=4),
    "cp2_pp2": case(4, {**CP, **PP}, micro_batches=4),
    "tp2_cp2": case(4, {**SP, **CP}),
    "tp2_dp2_sharded": case(4, {**TP, **BF16}, data_parallel_sharding_strategy="optim_grads_params"),
    "cp2_dp2": case(4, CP),
    "moe": case(1, MOE),
    "moe_bf16": case(1, {**MOE, **BF16}),
    "moe_fp32_router": case(1, {**MOE, **FP32_ROUTER}),
    "moe_fp32_router_lora": case(1, {**MOE, **FP32_ROUTER}, lora=LORA),
    "moe_shared": case(1, {**MOE, **SHARED, **BF16}),
    "moe_selective": case(1, {**MOE, **SELECTIVE, **BF16}),
    "moe_recompute": case(1, {**MOE, **FULL}),
    "moe_lora": case(1, MOE, lora=LORA),
    "moe_lora_bf16": case(1, {**MOE, **SHARED, **BF16}, lora=LORA),
    "moe_long": case(1, dict(MOE, padded_vocab_size=500), rows=1, length=1024, micro_batches=1),
    "moe_long_recompute": case(1, dict(MOE, padded_vocab_size=500, **BF16, **FULL), rows=1, length=1024, micro_batches=1),
    "moe_ep2": case(2, EP),
    "moe_ep2_long": case(2, dict(EP, padded_vocab_size=500), rows=1, length=1024, micro_batches=1),
    "moe_ep2_bf16": case(2, {**EP, **SHARED, **BF16}),
    "moe_ep2_balanced": case(2, {**EP, **BALANCED}),
    "moe_ep2_lora": case(2, EP, lora=LORA),
    "moe_ep2_recompute": case(2, {**EP, **FULL, **BALANCED}),
    "moe_ep2_selective": case(2, {**EP, **SELECTIVE}),
    "moe_ep2_allgather": case(2, dict(EP, moe_token_dispatcher_type="allgather")),
    "moe_ep2_allgather_recompute": case(2, dict(EP, moe_token_dispatcher_type="allgather", **FULL)),
    "moe_ep2_capacity": case(2, dict(EP, moe_expert_capacity_factor=1.5)),
    "moe_ep2_padded": case(2, dict(EP, moe_expert_capacity_factor=1.5, moe_pad_expert_input_to_capacity=True)),
    "moe_ep2_on_input": case(2, dict(EP, moe_apply_probs_on_input=True)),
    "moe_ep2_sharded": case(2, {**EP, **BF16}, data_parallel_sharding_strategy="optim_grads_params"),
    "moe_fp32_router_sharded": case(2, {**EP, **FP32_ROUTER}, data_parallel_sharding_strategy="optim_grads_params"),
    "moe_fp32_router_tp2_sp": case(2, {**EP, **SP, **FP32_ROUTER, **BALANCED}),
    "moe_etp2": case(2, {**MOE, **ETP}),
    "moe_ep2_tp2_sp": case(2, {**EP, **SP, **BALANCED}),
    "moe_ep2_tp2_sp_lora": case(2, {**EP, **SP, **SHARED}, lora=LORA),
    "moe_etp2_tp2_sp": case(2, {**MOE, **SP, **ETP, **SHARED}),
    "moe_sinks_cp2": case(2, dict(EP, hf_model_type="gpt_oss", softmax_type="learnable", **CP)),
    "moe_sinks_cp2_gather": case(2, dict(EP, hf_model_type="gpt_oss", softmax_type="learnable", cp_comm_type="all_gather", **CP)),
    "moe_whole_norm_tp2": case(
        2, dict(EP, hf_model_type="olmoe", qk_layernorm=True, qk_layernorm_whole=True, clip_qkv=2.0, **SP)
    ),
    "moe_etp2_biases": case(2, dict(MOE, hf_model_type="gpt_oss", add_bias_linear=True, **ETP)),
    "moe_sinkhorn_cp2": case(2, dict(EP, moe_router_load_balancing_type=["sinkhorn"], **CP)),
    "moe_capacity_cp2": case(2, dict(EP, moe_expert_capacity_factor=1.5, **CP)),
    "moe_ep2_cp2": case(2, {**EP, **CP, **BALANCED}),
    "moe_dp2": case(2, {**MOE, **BALANCED}),
    "moe_pp2": case(2, dict(MOE, moe_layer_freq=[0, 1, 1, 1, 1, 1, 1, 1], **PP), micro_batches=4),
    "moe_ep2_etp2": case(4, {**EP, **ETP}),
    "moe_ep2_etp2_lora": case(4, {**EP, **ETP}, lora=LORA),
    "moe_ep2_etp2_tp2_sp": case(4, {**EP, **ETP, **SP, **BALANCED}),
    "moe_ep2_pp2": case(4, {**EP, **PP}, micro_batches=4),
    "moe_ep2_pp2_zb": case(4, dict(EP, pipeline_schedule="zb-h1", **PP), micro_batches=4),
    "moe_ep2_dp4": case(4, {**EP, **BF16, **BALANCED}),
    "moe_tp2_dp2_sharded": case(4, {**EP, **SP, **BF16}, data_parallel_sharding_strategy="optim_grads_params"),
    "moe_allgather_etp2": case(4, dict(EP, moe_token_dispatcher_type="allgather", **ETP)),
}
PARALLEL = (
    *["tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"],
    *["expert_model_parallel_size", "expert_tensor_parallel_size"],
)


class Meter:
    """Bytes allocated inside a with block: `before` and `now`, at its beginning and its end, and `peak`, at its highest."""

    def __init__(self):
        self.cuda = torch.cuda.is_available()
        if not self.cuda:
            _core.count_cpu_memory()

    def read(self):
        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return _core.cpu_memory()

    def __enter__(self):
        (torch.cuda.reset_peak_memory_stats if self.cuda else _core.reset_peak_cpu_memory)()
        self.before, _ = self.read()
        return self

    def __exit__(self, *error):
        self.now, self.peak = self.read()


def batches(values):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    shape = (values["micro_batches"], 2, values["rows"], values["length"])
    tokens = torch.randint(0, 500, shape, generator=generator).to(device)
    result = [dict(input_ids=ids.clone(), labels=labels.clone()) for ids, labels in tokens]
    if values["documents"] > 1:
        ends = torch.arange(0, values["length"] + 1, values["length"] // values["documents"], dtype=torch.int32, device=device)
        for batch in result:
            batch["packed_seq_params"] = mb.PackedSeqParams(ends)
    return result


def context_share(batch):
    """This context-parallel rank's part of a batch."""
    if mb.get_parallel_state().cp_size == 1:
        return batch
    packed = batch.get("packed_seq_params")
    ends = packed.cu_seqlens if packed else None
    return {**batch, **{name: mb.split_cp_inputs(batch[name], ends, 1) for name in ("input_ids", "labels")}}


def is_away(storage):
    """Whether its memory is elsewhere meanwhile."""
    try:
        return storage.data_ptr() == 0
    except RuntimeError:
        return True


def kept_bytes(model, batch):
    """Bytes of all storages that autograd keeps for one micro-batch (this rank's share, ForwardInput's names), parameters excluded;
    and of those among them that wait in host memory."""
    from torch.autograd.graph import saved_tensors_hooks

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage._cdata] = storage  # held: an address is not used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch)
    total = sum(storage.nbytes() for storage in storages.values())
    offloaded = sum(storage.nbytes() for storage in storages.values() if is_away(storage))
    storages.clear()
    loss.sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    return total, offloaded


def measure(values, scale=1):
    """One rank's numbers of one case: the plan's stage, the bytes of the states and of a step, the communication of a step; and
    where there is one stage what autograd keeps of a micro-batch."""
    fields = {**MODEL, **values["fields"]}
    for name in ("hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "kv_channels"):
        if name in fields:
            fields[name] *= scale
    mb.initialize_model_parallel(**{name: fields[name] for name in PARALLEL if name in fields})
    state = mb.get_parallel_state()
    config = mb.ModelConfig(**fields)
    options = mb.LoraOptions(**values["lora"]) if values["lora"] else None
    rows, length, documents = (values[name] for name in ("rows", "length", "documents"))
    plan = mb.plan_layout(
        config,
        lora=options,
        processes=values["processes"],
        micro_batch_size=rows,
        global_batch_size=rows * values["micro_batches"] * state.dp_size,
        sequence_length=length,
        documents=documents,
        optimizer=values["optimizer"],
        gpu_kernels=torch.cuda.is_available(),
        reserve=0,
        margin=0,
    )
    estimate = plan["stages"][state.pp_rank]
    memory = estimate["memory"]
    result = dict(
        rank=state.rank,
        first=state.dp_rank == 0 and state.cp_rank == 0,
        planned_states=memory["weights"] + memory["gradients"] + memory["optimizer"],
        planned_step=memory["activations"] + memory["workspace"] + memory["communication"],
        activations=memory["activations"],
        planned_communication=estimate["communication"],
    )
    data = batches(values)
    with Meter() as states:
        models = mb.get_mcore_model(config)
        config.bridge.initialize(models, seed=1)
        if options:
            mb.add_lora(models, options)
        trainer = mb.Trainer(models, lr=1e-3, train_iters=4, **values["optimizer"])
    trainer.train_step(data)
    mb.reset_communication_volume()
    with Meter() as step:
        trainer.train_step(data)
    result.update(states=states.now - states.before, step=step.peak - states.now, communication=mb.communication_volume())
    del trainer
    sharded = values["optimizer"].get("data_parallel_sharding_strategy") == "optim_grads_params"
    codes = any(p.requires_grad and p.dtype == torch.float8_e4m3fn for p in models[0].parameters())  # have no .grad
    if state.pp_size == 1 and not sharded and not codes and not torch.cuda.is_available():
        for model in models:
            model.train()
        segments = _core.segments(models[0].engine, rows, length // state.cp_size, documents=documents, training_loss=False)
        result.update(planned_kept=sum(segment["saved"] for segment in segments), segments=segments)
        if fields.get("recompute_granularity") == "full":  # cos and sin, which layers run again hold without autograd's knowledge
            result["planned_kept"] -= (
                rows * (length // state.cp_size) * fields["kv_channels"] * (2 if fields.get("params_dtype") else 4)
            )
        result["kept"], _ = kept_bytes(models[0], context_share(data[0]))
    del models
    mb.destroy_model_parallel()
    return result


def counted(traffic):
    """{group: {operation: (calls, bytes)}} of a communication volume."""
    return {
        group: {operation: (line["calls"], line["bytes"]) for operation, line in operations.items()}
        for group, operations in traffic.items()
    }


def run(names, scale=1):
    """{case: [numbers of every rank]} of the cases for as many processes as there are."""
    import torch.distributed as dist

    processes = dist.get_world_size() if dist.is_initialized() else 1
    results = {}
    for name in names:
        if CASES[name]["processes"] != processes:
            continue
        found = measure(CASES[name], scale)
        every = [None] * processes
        if processes > 1:
            dist.all_gather_object(every, found)
        results[name] = every if processes > 1 else [found]
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    import torch.distributed as dist

    if "RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    results = run(arguments.cases, arguments.scale)
    if not dist.is_initialized() or dist.get_rank() == 0:
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(results, indent=1))
        print(
            f"{'case':22} rank {'states MB':>10} planned {'step MB':>10} planned   error {'kept MB':>10} planned   communication"
        )
        for name, ranks in results.items():
            for r in ranks:
                error = r["planned_step"] / r["step"] - 1
                kept = f"{r['kept'] / 1e6:10.2f} {r['planned_kept'] / 1e6:7.2f}" if "kept" in r else " " * 18
                same = counted(r["communication"]) == counted(r["planned_communication"])
                print(
                    f"{name:22} {r['rank']:4} {r['states'] / 1e6:10.2f} {r['planned_states'] / 1e6:7.2f} {r['step'] / 1e6:10.2f} "
                    f"{r['planned_step'] / 1e6:7.2f} {100 * error:+7.1f}% {kept}   {'as planned' if same else 'differs' if r['first'] else '(of another shard)'}"
                )
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
