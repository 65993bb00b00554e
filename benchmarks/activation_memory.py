"""Peak memory of a training step by what is recomputed, offloaded or split: `python benchmarks/activation_memory.py [MODE ...]`.

Each mode runs in processes of its own; printed is how far the tensors of rank 0 rose above what there was before the step (weights,
gradients, optimizer states), as the allocator counts them, and the time of the step after. On the CPU offloaded activations are
in the memory that is counted."""

import argparse
import json
import os
import subprocess
import sys
import time

MODES = {
    "none": (1, {}),
    "selective core_attn": (1, dict(recompute_granularity="selective")),
    "selective mlp": (1, dict(recompute_granularity="selective", recompute_modules=["mlp"])),
    "full uniform 1": (1, dict(recompute_granularity="full")),
    "full uniform 2": (1, dict(recompute_granularity="full", recompute_num_layers=2)),
    "full block 4": (1, dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=4)),
    "offload 8": (1, dict(cpu_offloading=True, cpu_offloading_num_layers=8)),
    "tp 2": (2, dict(tensor_model_parallel_size=2)),
    "tp 2 sp": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True)),
    "tp 2 sp overlap": (2, dict(tensor_model_parallel_size=2, sequence_parallel=True, tp_comm_overlap=True)),
    "cp 2 p2p": (2, dict(context_parallel_size=2)),
    "cp 2 all_gather": (2, dict(context_parallel_size=2, cp_comm_type="all_gather")),
    "cp 2 a2a": (2, dict(context_parallel_size=2, cp_comm_type="a2a")),
}
MODEL = dict(
    model_type="qwen3", hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
    head_dim=64, vocab_size=1024, max_position_embeddings=4096, rms_norm_eps=1e-6, tie_word_embeddings=False,
)  # fmt: skip
SIZES = ("tensor_model_parallel_size", "context_parallel_size")


def run(fields, length, rows):
    import mcore_bridge as mb
    import torch
    from plan_memory import Meter

    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    step = Meter()
    mb.initialize_model_parallel(**{key: fields[key] for key in SIZES if key in fields})
    config = mb.ModelConfig(**mb.hf_to_mcore_config(MODEL), **fields)
    models = mb.get_mcore_model(config)
    config.bridge.initialize(models, seed=1)
    trainer = mb.Trainer(models, lr=1e-4, train_iters=4)
    ids = torch.randint(0, 1024, (rows, length), generator=torch.Generator().manual_seed(0))
    batch = dict(input_ids=ids, labels=ids)
    small = dict(input_ids=ids[:, :16], labels=ids[:, :16])
    trainer.train_step([small])
    with step:
        trainer.train_step([batch])
    peak = step.peak - step.before
    start = time.monotonic()
    loss = trainer.train_step([batch]).loss
    seconds = time.monotonic() - start
    if mb.get_parallel_state().rank == 0:
        print(json.dumps(dict(mib=peak / 2**20, seconds=seconds, loss=loss)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modes", nargs="*", help=", ".join(MODES))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--fields", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fields is not None:
        return run(json.loads(arguments.fields), arguments.length, arguments.rows)
    print(f"{'mode':20} {'MiB':>8} {'s/step':>8} {'loss':>9}   ({arguments.rows} rows of {arguments.length} tokens, float32)")
    for mode in arguments.modes or MODES:
        processes, fields = MODES[mode]
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [__file__, "--fields", json.dumps(fields), "--length", str(arguments.length), "--rows", str(arguments.rows)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            sys.exit(finished.stderr[-3000:])
        result = json.loads([line for line in finished.stdout.splitlines() if line.startswith("{")][-1])
        print(f"{mode:20} {result['mib']:8.0f} {result['seconds']:8.2f} {result['loss']:9.6f}", flush=True)


if __name__ == "__main__":
    main()
