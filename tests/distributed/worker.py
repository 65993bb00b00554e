"""Runs cases under torchrun (or alone) and writes what rank 0 saw: `worker.py JOB.json OUT.pt`.

A job is {folder, cases: [{name, layout, lora, packed, steps, micro_batches, options}]}; all cases run in one launch, since
starting the processes costs more than the tiny models."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
import mcore_bridge as mb  # noqa: E402
import tiny  # noqa: E402
from mcore_bridge.engine import _core  # noqa: E402

LAYOUT_ARGUMENTS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


def micro_batch(index, packed):
    """A micro-batch of this index. packed: documents in one row; "padded": each a multiple of 8, with padding behind it, every
    fourth micro-batch with loss in one document only; "unequal": rows of which some have one token with loss, or none."""
    if packed in (False, "unequal"):
        ids, labels = tiny.rows(2, 16, seed=100 + index)
        if packed == "unequal":  # one token with loss, none, all, the last of a row
            keep = torch.zeros_like(labels, dtype=torch.bool)
            keep[0, 5], keep[1, -1] = index % 4 == 0, index % 4 == 3
            labels = labels.clamp(min=3).masked_fill(~keep, -100) if index % 4 != 2 else labels.clamp(min=3)
        elif index % 2:  # unequal numbers of loss tokens
            labels[:, :9] = -100
        return dict(input_ids=ids, labels=labels)
    lengths = [5 + index % 3, 12 - index % 3, 7]
    if packed == "padded":
        return padded_documents(index, lengths)
    ids, labels = tiny.rows(1, sum(lengths), seed=200 + index)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    for end in ends[1:].tolist():
        labels[:, end - 1] = -100
    return dict(input_ids=ids, labels=labels, packed_seq_params=mb.PackedSeqParams(cu_seqlens=ends.int()))


def peak_bytes(work):
    """Most bytes of host memory that tensors made during work() hold at once, as the profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def padded_documents(index, lengths):
    tokens, labels, ends = [], [], [0]
    for number, length in enumerate(lengths):
        whole = length + -length % 8
        ids, targets = tiny.rows(1, whole, seed=300 + 10 * index + number)
        targets[:, length - 1 :] = -100
        if index % 4 == 1 and number != 1:
            targets[:] = -100
        tokens.append(ids)
        labels.append(targets)
        ends.append(ends[-1] + whole)
    packing = mb.PackedSeqParams(cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    return dict(input_ids=torch.cat(tokens, 1), labels=torch.cat(labels, 1), packed_seq_params=packing)


def held_alike(models, state):
    """Whether tensor-parallel ranks still hold the same values of every parameter that is not split."""
    if state.tp_size == 1:
        return True
    group = state.groups["tp"][0]
    alike = True
    for model in models:
        split = model.engine.tp_split()
        for name, parameter in model.named_parameters():
            if not split[name]:
                copies = [torch.empty_like(parameter) for _ in range(state.tp_size)]
                dist.all_gather(copies, parameter.detach(), group=group)
                alike = alike and all(torch.equal(copy, copies[0]) for copy in copies)
    return alike


def direct_forward(models, batch, state):
    """Losses (of all ranks together) and gradients through model(...) itself, from inputs split by hand."""
    (model,) = models
    packing = batch["packed_seq_params"]

    def split(tensor):
        return mb.split_cp_inputs(tensor, packing.cu_seqlens, 1)

    positions = torch.cat([torch.arange(length) for length in packing.cu_seqlens.diff().tolist()])[None]
    losses = []
    for given in (split(positions), None):
        losses.append(
            model(split(batch["input_ids"]), position_ids=given, labels=split(batch["labels"]), packed_seq_params=packing)
        )
    assert torch.equal(losses[0], losses[1]), "default positions are those of the whole row"
    losses[0].sum().backward()
    mb.finish_gradients(models)
    total = losses[0].detach().sum()
    if state.cp_size > 1:
        dist.all_reduce(total)
    return dict(loss=total, gradients={name: parameter.grad.clone() for name, parameter in model.named_parameters()})


def crowd(models, topk, state):
    """From now on every token of the 2 x 16 ones goes to the first `topk` experts, wherever those are."""
    tokens = 32 // state.cp_size // (state.tp_size if models[0].config.sequence_parallel else 1)
    choice = torch.arange(topk).expand(tokens, topk)
    for model in models:
        model.engine.replay_routing([[choice] * 500 for _ in range(model.engine.num_routers)])


def run(case, folder):
    layout = case.get("layout", {})
    mb.initialize_model_parallel(**{LAYOUT_ARGUMENTS[key]: value for key, value in layout.items() if key in LAYOUT_ARGUMENTS})
    state = mb.get_parallel_state()
    mb.set_random_seed(1234)
    sizes = {argument: layout[key] for key, argument in LAYOUT_ARGUMENTS.items() if key in layout}
    config = mb.ModelConfig(
        **{
            **mb.hf_to_mcore_config(folder),
            **sizes,
            "sequence_parallel": layout.get("sp", False),
            **layout.get("fields", {}),
            **case.get("fields", {}),
        }
    )
    models = mb.get_mcore_model(config)
    if case.get("initialize"):
        config.bridge.initialize(models, seed=7)
    else:
        config.bridge.load_weights(models, folder)
    lora = case.get("lora")
    if lora is not None:
        mb.add_lora(models, mb.LoraOptions(**lora))
    if "seed" in case:
        mb.set_random_seed(case["seed"])
    if case.get("direct"):
        result = direct_forward(models, micro_batch(0, case["packed"]), state)
        mb.destroy_model_parallel()
        return dict(direct=result)
    trainer = mb.Trainer(
        models,
        **{
            "lr": 2e-3,
            "train_iters": max(1, case["steps"]),
            "lr_warmup_iters": min(2, case["steps"] // 2),
            "weight_decay": 0.1,
            **case.get("options", {}),
        },
    )
    memory = trainer.memory
    if case.get("crowded"):
        crowd(models, case["crowded"], state)
    total = case.get("micro_batches", 4)
    share = total // state.dp_size
    losses, norms, loss_tokens = [], [], []
    mb.reset_communication_volume()
    for step in range(case["steps"]):
        mine = range(state.dp_rank * share, (state.dp_rank + 1) * share)
        result = trainer.train_step(
            [micro_batch((step * total + index) % (2 * total), case.get("packed", False)) for index in mine]
        )
        losses.append(result.loss)
        norms.append(result.grad_norm)
        loss_tokens.append(result.loss_tokens)
    volume = mb.communication_volume()
    peaks = []
    if "peak" in case:  # [rows, length, micro-batches]: memory of one step more, on every rank
        rows, length, count = case["peak"]
        ids, labels = tiny.rows(rows, length, seed=3)
        batches = [dict(input_ids=ids, labels=labels)] * count
        trainer.train_step(batches)
        peaks = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, peak_bytes(lambda: trainer.train_step(batches)))
    evaluated = trainer.evaluate([micro_batch(900 + index, case.get("packed", False)) for index in range(2)])
    weights = {name: tensor.clone() for name, tensor in config.bridge.export_weights(models)}
    adapter = {}
    if lora is not None:
        adapter = {name: tensor.clone() for name, tensor in config.bridge.export_weights(models, peft_format=True)}
    amax = {name: values.clone() for name, values in _core.fp8_history([model.engine for model in models]).items()}
    ids, _ = tiny.rows(2, 16, seed=1)
    logits = mb.forward_logits(models, ids)
    out = case.get("save")
    if out:
        config.bridge.save_weights(models, out, max_shard_size="50KB")
    with mb.materialised(models):
        alike = held_alike(models, state)
    mb.destroy_model_parallel()
    return dict(
        losses=losses,
        norms=norms,
        evaluated=evaluated,
        weights=weights,
        adapter=adapter,
        logits=logits,
        peaks=peaks,
        volume=volume,
        loss_tokens=loss_tokens,
        memory=memory,
        alike=alike,
        amax=amax,
    )


def main():
    job_path, out_path = sys.argv[1:]
    job = json.loads(Path(job_path).read_text())
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    results = {case["name"]: run(case, job["folder"]) for case in job["cases"]}
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(results, out_path)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
