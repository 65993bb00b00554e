"""The GPU table: one training step of dense models, ours beside Transformers (+ PEFT) eager, compiled and with Liger kernels.

    python benchmarks/gpu.py                                         everything, one process per row and engine
    python benchmarks/gpu.py --cases 8b-lora --engines ours liger
    python benchmarks/gpu.py --cases 8b-lora --engines ours --profile    where the time goes, by kernel

Random weights at the real sizes, bf16. Ours keeps fp32 masters and moments; the peers bf16 ones and no master. FLOPs: 6 per matrix weight and
token (4 when the base is frozen), causal attention at half. "first step" is from process start, imports and model construction included.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time

START = time.time()

QWEN3 = dict(num_key_value_heads=8, head_dim=128, vocab_size=151936)
SHAPES = {
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
                 vocab_size=2048, tie_word_embeddings=True),
    "0.6b": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, tie_word_embeddings=True, **QWEN3),
    "4b": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, tie_word_embeddings=True, **QWEN3),
    "8b": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, tie_word_embeddings=False, **QWEN3),
}  # fmt: skip
SHAPES["8b-half"] = SHAPES["8b"] | dict(num_hidden_layers=18)  # what full training with fp32 masters leaves room for
FP8 = dict(fp8="hybrid", fp8_recipe="tensorwise")
CASES = {
    "tiny": dict(shape="tiny", tuner="full", batch=2, length=256),
    "tiny-lora": dict(shape="tiny", tuner="lora", batch=2, length=256),
    "8b-lora": dict(shape="8b", tuner="lora", batch=2, length=4096),
    "8b-lora-packed": dict(shape="8b", tuner="lora", batch=2, length=4096, documents=4),
    "8b-lora-recompute": dict(shape="8b", tuner="lora", batch=2, length=4096, recompute=True),
    "8b-lora-fp8": dict(shape="8b", tuner="lora", batch=2, length=4096, config=FP8),
    "8b-lora-fp8-delayed": dict(shape="8b", tuner="lora", batch=2, length=4096, config=FP8 | dict(fp8_recipe="delayed")),
    "8b-lora-fp8-blockwise": dict(
        shape="8b", tuner="lora", batch=2, length=4096, config=FP8 | dict(fp8="e4m3", fp8_recipe="blockwise")
    ),
    "8b-half-full": dict(shape="8b-half", tuner="full", batch=2, length=4096),
    "8b-half-full-fp8": dict(shape="8b-half", tuner="full", batch=2, length=4096, config=FP8),
    "8b-half-full-fp8-delayed": dict(
        shape="8b-half", tuner="full", batch=2, length=4096, config=FP8 | dict(fp8_recipe="delayed")
    ),
    "8b-half-full-fp8-blockwise": dict(
        shape="8b-half", tuner="full", batch=2, length=4096, config=FP8 | dict(fp8="e4m3", fp8_recipe="blockwise")
    ),
    "tiny-fp8": dict(shape="tiny", tuner="full", batch=2, length=256, config=FP8),
    "4b-full": dict(shape="4b", tuner="full", batch=2, length=4096),
    "0.6b-lora-512": dict(shape="0.6b", tuner="lora", batch=1, length=512),
    "0.6b-full": dict(shape="0.6b", tuner="full", batch=4, length=4096),
    "0.6b-full-packed": dict(shape="0.6b", tuner="full", batch=4, length=4096, documents=4),
}
ENGINES = ["ours", "eager", "compiled", "liger"]
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # dense bf16, the vendor's datasheets


def flops(case):
    """Forward + backward FLOPs of a step; causal attention counted at half."""
    s, tokens = SHAPES[case["shape"]], case["batch"] * case["length"]
    heads, groups, d, h = s["num_attention_heads"], s["num_key_value_heads"], s["head_dim"], s["hidden_size"]
    layer = h * (heads + 2 * groups) * d + heads * d * h + 3 * h * s["intermediate_size"]
    matrices = s["num_hidden_layers"] * layer + h * s["vocab_size"]
    length = tokens // case["documents"] if "documents" in case else case["length"]
    attention = s["num_hidden_layers"] * 2 * heads * d * length  # QK^T and PV, half of the square, 2 FLOPs each
    return ((6 if case["tuner"] == "full" else 4) * matrices + 3 * attention) * tokens


def hf_config(case):
    from transformers import Qwen3Config

    return Qwen3Config(
        **SHAPES[case["shape"]], max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1e6, dtype="bfloat16"
    )


def batch(case):
    import torch

    generator = torch.Generator().manual_seed(1)
    shape = (case["batch"], case["length"] + 1)
    tokens = torch.randint(0, SHAPES[case["shape"]]["vocab_size"], shape, generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def fill(parameters):
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            p.normal_(0, 0.02) if p.dim() > 1 else p.fill_(1)


def ours(case):
    import tempfile

    import mcore_bridge as mb

    with tempfile.TemporaryDirectory() as folder:
        hf_config(case).save_pretrained(folder)
        given = mb.hf_to_mcore_config(folder)
    recompute = (
        dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1) if case.get("recompute") else {}
    )
    config = mb.ModelConfig(**given, params_dtype="bfloat16", **recompute, **case.get("config", {}))
    models = mb.get_mcore_model(config, device="cuda")
    fill(models[0].parameters())
    if case["tuner"] == "lora":
        mb.add_lora(models, mb.LoraOptions(r=16, lora_alpha=32))
    trainer = mb.Trainer(models, lr=1e-4, lr_decay_style="constant", train_iters=1000)
    ids, labels = batch(case)
    if "documents" in case:
        import torch

        ends = torch.linspace(0, ids.numel(), case["documents"] + 1).int()
        micro = dict(input_ids=ids.view(1, -1), labels=labels.view(1, -1), packed_seq_params=mb.PackedSeqParams(ends))
    else:
        micro = dict(input_ids=ids, labels=labels)
    return lambda: trainer.train_step([micro]).loss


def transformers(case, engine):
    import torch
    from transformers import AutoModelForCausalLM

    if engine == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        apply_liger_kernel_to_qwen3()
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(hf_config(case), dtype=torch.bfloat16, attn_implementation="sdpa")
    fill(model.parameters())
    model.train()
    if case.get("recompute"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if case["tuner"] == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids, labels = (x.cuda() for x in batch(case))
    forward = torch.compile(model) if engine == "compiled" else model

    def step():
        loss = forward(input_ids=ids, labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(name, engine, steps, profile):
    import torch

    case = CASES[name]
    step = ours(case) if engine == "ours" else transformers(case, engine)
    losses = [step()]
    torch.cuda.synchronize()
    first = time.time() - START
    losses += [step(), step()]
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if profile:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiled

        with profiled(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as report:
            step()
            torch.cuda.synchronize()
        kernels, spans = {}, []
        for event in report.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                spans.append((event.time_range.start, event.time_range.end, event.name))
                total, count = kernels.get(event.name, (0, 0))
                kernels[event.name] = (total + event.device_time_total, count + 1)
        spans.sort()
        gaps = sorted(((later[0] - earlier[1], earlier[2][:60], later[2][:60]) for earlier, later in zip(spans, spans[1:], strict=False)),
                      reverse=True)  # fmt: skip
        idle = sum(max(0, gap[0]) for gap in gaps)
        print(
            f"span {(spans[-1][1] - spans[0][0]) / 1e3:.1f} ms, idle between kernels {idle / 1e3:.1f} ms; largest gaps:",
            file=sys.stderr,
        )
        for gap, before, after in gaps[:8]:
            print(f"{gap / 1e3:9.3f} ms between {before} and {after}", file=sys.stderr)
        total = sum(time for time, _ in kernels.values())
        print(f"{name} {engine}: {total / 1e3:.1f} ms in {sum(count for _, count in kernels.values())} kernels", file=sys.stderr)
        for kernel, (spent, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:40]:
            print(f"{spent / 1e3:9.2f} ms {count:6d} x  {kernel[:150]}", file=sys.stderr)
    free, total = torch.cuda.mem_get_info()
    return dict(case=name, engine=engine, seconds=statistics.median(times), first=first, peak=torch.cuda.max_memory_allocated() / 2**30,
                reserved=torch.cuda.max_memory_reserved() / 2**30, losses=[losses[0], losses[-1]])  # fmt: skip


def row(result, peak_tflops):
    case = CASES[result["case"]]
    tokens, work = case["batch"] * case["length"], flops(case) / result["seconds"] / 1e12
    mfu = f"{100 * work / peak_tflops:.0f} %" if not math.isnan(peak_tflops) else ""
    return (f"| {result['case']} | {result['engine']} | {result['seconds'] * 1e3:.1f} | {tokens / result['seconds']:,.0f} | {work:.0f} | {mfu} | "
            f"{result['peak']:.1f} | {result['first']:.1f} | {result['losses'][0]:.4f} | {result['losses'][1]:.4f} |")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=[name for name in CASES if not name.startswith("tiny")])
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=ENGINES)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--timeout", type=int, default=240, help="seconds a row may take")
    parser.add_argument(
        "--budget", type=int, default=570, help="seconds all rows may take together; later rows are left out and named"
    )
    parser.add_argument("--one", nargs=2, metavar=("CASE", "ENGINE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one, arguments.steps, arguments.profile)))
        return
    import torch

    device = torch.cuda.get_device_name()
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in device), float("nan"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print(f"{' '.join(sys.argv)} | commit {commit or 'unknown'} | torch {torch.__version__} | {device}\n")
    print("| case | engine | ms/step | tok/s | TFLOP/s | MFU | peak GiB | first step s | first loss | last loss |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for case in arguments.cases:
        for engine in arguments.engines:
            if engine != "ours" and CASES[case].keys() & {"documents", "config"}:
                continue  # the peers are measured on the same tokens unpacked
            left = min(arguments.timeout, arguments.budget - (time.time() - START))
            command = [sys.executable, __file__, "--one", case, engine, "--steps", str(arguments.steps)]
            if left < 20:
                print(f"| {case} | {engine} | not run: the time is up |", flush=True)
                continue
            try:
                done = subprocess.run(command + ["--profile"] * arguments.profile, capture_output=True, text=True, timeout=left, check=True,
                                      env=os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})  # fmt: skip
                print(row(json.loads(done.stdout.strip().splitlines()[-1]), peak), flush=True)
                if arguments.profile:
                    print(done.stderr, flush=True)
            except subprocess.TimeoutExpired:
                print(f"| {case} | {engine} | more than {left:.0f} s |", flush=True)
            except subprocess.CalledProcessError as error:
                print(f"| {case} | {engine} | failed: {error.stderr.strip().splitlines()[-1][:200]} |", flush=True)


if __name__ == "__main__":
    main()
