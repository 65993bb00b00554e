"""Loading and saving against plain threads that move the same bytes, against safetensors, and against the scheme "every rank reads
whole tensors; rank 0 gathers and writes".

    python benchmarks/bridge_io.py [--gib 3] [--processes 1 2 4] [--repeat 3] [--folder /tmp]

A generated multi-shard checkpoint (Qwen3 layers, bf16, random bytes) lies in --folder meanwhile; every scheme runs in the same
processes, in --repeat rounds one after the other, and the best of each counts. "cold": the files' pages are dropped first (posix_fadvise).
Before every save the disk has
settled (sync). GB/s: bytes of the checkpoint per second of the slowest rank. Tensor parallelism over all processes, on the CPU, Gloo.
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CONFIG = dict(
    architectures=["Qwen3ForCausalLM"],
    model_type="qwen3",
    vocab_size=64_000,
    hidden_size=2048,
    intermediate_size=6144,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
    hidden_act="silu",
    torch_dtype="bfloat16",
)
BLOCK = 4 << 20


def shapes(layers):
    h, i, d = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    q, kv = CONFIG["num_attention_heads"] * d, CONFIG["num_key_value_heads"] * d
    yield "model.embed_tokens.weight", (CONFIG["vocab_size"], h)
    for n in range(layers):
        for name, shape in {
            "self_attn.q_proj.weight": (q, h),
            "self_attn.k_proj.weight": (kv, h),
            "self_attn.v_proj.weight": (kv, h),
            "self_attn.o_proj.weight": (h, q),
            "self_attn.q_norm.weight": (d,),
            "self_attn.k_norm.weight": (d,),
            "mlp.gate_proj.weight": (i, h),
            "mlp.up_proj.weight": (i, h),
            "mlp.down_proj.weight": (h, i),
            "input_layernorm.weight": (h,),
            "post_attention_layernorm.weight": (h,),
        }.items():
            yield f"model.layers.{n}.{name}", shape
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (CONFIG["vocab_size"], h)


def generate(folder, gib):
    """Writes the checkpoint; returns its bytes."""
    sizes = {name: 2 * (shape[0] * (shape[1] if len(shape) > 1 else 1)) for name, shape in shapes(1)}
    layer = sum(size for name, size in sizes.items() if ".layers." in name)
    layers = max(2, round((gib * 2**30 - (sum(sizes.values()) - layer)) / layer))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    shards, filled = [[]], 0
    for name, shape in shapes(layers):
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if shards[-1] and filled + size > 1e9:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape, size))
        filled += size
    noise = os.urandom(1 << 20)
    noise = bytes(b & 0x3F for b in noise[: 1 << 16]) * 16  # finite small numbers
    weight_map, total = {}, 0
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        header, at = {}, 0
        for name, shape, size in shard:
            header[name] = dict(dtype="BF16", shape=list(shape), data_offsets=[at, at + size])
            weight_map[name] = file
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            left = at
            while left:
                left -= out.write(noise[: min(left, len(noise))])
            os.fsync(out.fileno())
        total += at
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata=dict(total_size=total), weight_map=weight_map)))
    return total


def files_of(folder):
    return sorted(folder.glob("*.safetensors"))


def drop_cache(folder):
    for file in files_of(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def share(folder, rank, world):
    """This rank's blocks of all the files' bytes: (file, offset, bytes)."""
    for file in files_of(folder):
        size = file.stat().st_size
        for at in range(size * rank // world, size * (rank + 1) // world, BLOCK):
            yield file, at, min(BLOCK, size * (rank + 1) // world - at)


def plain_read(folder, rank, world, threads, buffer):
    """preadv of this rank's share of the bytes into memory that is there, by as many threads."""
    descriptors = {file: os.open(file, os.O_RDONLY) for file in files_of(folder)}
    starts, at = [], 0
    for file, offset, size in share(folder, rank, world):
        starts.append((file, offset, size, at))
        at += size

    def read(task):
        file, offset, size, start = task
        assert os.preadv(descriptors[file], [buffer[start : start + size]], offset) == size

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, starts))
    for descriptor in descriptors.values():
        os.close(descriptor)


def plain_write(source, target, rank, world, threads, buffer, barrier):
    """pwrite of the same share into new files of the same sizes, then fsync."""
    if rank == 0:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for file in files_of(source):
            with open(target / file.name, "wb") as out:
                os.posix_fallocate(out.fileno(), 0, file.stat().st_size)
    barrier()
    descriptors = {file: os.open(target / file.name, os.O_WRONLY) for file in files_of(source)}
    tasks, at = [], 0
    for file, offset, size in share(source, rank, world):
        tasks.append((file, offset, size, at))
        at += size

    def write(task):
        file, offset, size, start = task
        assert os.pwrite(descriptors[file], buffer[start : start + size], offset) == size

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, tasks))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(os.fsync, descriptors.values()))
    for descriptor in descriptors.values():
        os.close(descriptor)


def worker(folder, out, repeat, schemes):
    import torch
    import torch.distributed as dist
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
    import mcore_bridge as mb

    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    if world > 1:
        dist.init_process_group("gloo")
    barrier = dist.barrier if world > 1 else lambda: None
    mb.initialize_model_parallel(tensor_model_parallel_size=world)
    config = mb.ModelConfig(**{**mb.hf_to_mcore_config(folder), "params_dtype": torch.bfloat16}, tensor_model_parallel_size=world)
    models = mb.get_mcore_model(config)
    for parameter in models[0].parameters():
        parameter.data.zero_()  # their pages are there, as they are in the plain buffers
    total = sum(file.stat().st_size for file in files_of(folder))
    threads = max(2, min(16, 2 * len(os.sched_getaffinity(0)) // world))
    buffer = memoryview(bytearray(total // world + (64 << 20)))
    results = {}

    plan = []  # (name, work, what comes before the clock starts)

    def measure(name, work, before=None):
        if not schemes or any(name.startswith(scheme) for scheme in schemes):
            plan.append((name, work, before))

    def run():
        """Rounds over all schemes, so that a slow minute of the disk meets all of them."""
        for number in range(repeat):
            for name, work, before in plan[number % len(plan) :] + plan[: number % len(plan)]:
                if before and rank == 0:
                    before()
                barrier()
                start = time.perf_counter()
                work()
                barrier()
                results[name] = min(results.get(name, float("inf")), time.perf_counter() - start)

    def ours_load():
        config.bridge.load_weights(models, folder, disable_tqdm=True)

    def whole_load():
        """The original's scheme: every rank reads whole tensors and keeps its slice."""
        for file in files_of(folder):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    tensor = opened.get_tensor(name).clone()
                    dim = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
                    if tensor.dim() == 2:
                        tensor.chunk(world, dim)[rank].clone()

    def state_dict_load():
        target = {}
        for file in files_of(folder):
            for name, tensor in load_file(file).items():
                target.setdefault(name, torch.empty_like(tensor)).copy_(tensor)

    def ours_save():
        config.bridge.save_weights(models, out / "ours", max_shard_size="1GB", disable_tqdm=True)

    def gather_save():
        """The original's scheme: a collective per tensor, rank 0 writes shard after shard."""
        target = out / "gathered"
        if rank == 0:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
        shard, filled, number = {}, 0, 0

        def flush():
            save_file(shard, target / f"{number}.safetensors")
            descriptor = os.open(target / f"{number}.safetensors", os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

        layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
        for name, shape in shapes(layers):
            tensor = torch.zeros(shape, dtype=torch.bfloat16)
            if world > 1 and tensor.dim() == 2:
                dim = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
                part = tensor.chunk(world, dim)[rank].contiguous()
                parts = [torch.empty_like(part) for _ in range(world)]
                dist.all_gather(parts, part)
                tensor = torch.cat(parts, dim)
            if rank:
                continue
            if shard and filled + tensor.nbytes > 1e9:
                flush()
                shard, filled, number = {}, 0, number + 1
            shard[name] = tensor
            filled += tensor.nbytes
        if rank == 0:
            flush()

    def stream(**options):
        for _ in config.bridge.export_weights(models, **options):
            pass

    def all_reduce_stream():
        """What the stream did before: every rank sums whole buckets, of which it owns a part."""
        left = total
        while left > 0:
            dist.all_reduce(torch.zeros(min(left, 128 << 20) // 8, dtype=torch.long))
            left -= 128 << 20

    cold = lambda: drop_cache(folder)  # noqa: E731

    def settled():
        """What earlier schemes left to be written is on disk."""
        os.sync()
        time.sleep(1)

    measure("load, plain pread, warm", lambda: plain_read(folder, rank, world, threads, buffer))
    measure("load, ours, warm", ours_load)
    measure("load, whole tensors on every rank, warm", whole_load)
    if world == 1:
        measure("load, safetensors + copy, warm", state_dict_load)
    measure("load, plain pread, cold", lambda: plain_read(folder, rank, world, threads, buffer), cold)
    measure("load, ours, cold", ours_load, cold)
    measure(
        "save, plain pwrite + fsync", lambda: plain_write(folder, out / "plain", rank, world, threads, buffer, barrier), settled
    )
    measure("save, ours", ours_save, settled)
    measure("save, gather and one writer", gather_save, settled)
    measure("stream to all ranks", stream)
    if world > 1:
        measure("stream to rank 0", lambda: stream(only_master_rank=True))
        measure("stream, integer all-reduce", all_reduce_stream)
    run()
    if rank == 0:
        print("RESULT " + json.dumps(dict(total=total, seconds=results)), flush=True)
    if world > 1:
        dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--schemes", nargs="*", default=[], help="only schemes whose names begin so, e.g. load")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.worker / "model", arguments.worker, arguments.repeat, arguments.schemes)
    work = Path(tempfile.mkdtemp(prefix="mcb_bridge_io_", dir=arguments.folder))
    try:
        (work / "model").mkdir()
        total = generate(work / "model", arguments.gib)
        print(f"{total / 1e9:.2f} GB, {len(os.sched_getaffinity(0))} cores, best of {arguments.repeat}")
        rows = {}
        for processes in arguments.processes:
            prefix = [sys.executable]
            if processes > 1:
                prefix += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            more = ["--schemes", *arguments.schemes] if arguments.schemes else []
            finished = subprocess.run(
                [*prefix, __file__, "--worker", work, "--repeat", str(arguments.repeat), *more],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            line = next(line for line in finished.stdout.splitlines() if line.startswith("RESULT "))
            for name, seconds in json.loads(line[7:])["seconds"].items():
                rows.setdefault(name, {})[processes] = seconds
        print("| seconds (GB/s) | " + " | ".join(f"{p} process{'es' * (p > 1)}" for p in arguments.processes) + " |")
        print("|---" * (len(arguments.processes) + 1) + "|")
        for name, found in rows.items():
            cells = [f"{found[p]:.2f} ({total / 1e9 / found[p]:.2f})" if p in found else "" for p in arguments.processes]
            print(f"| {name} | " + " | ".join(cells) + " |")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
