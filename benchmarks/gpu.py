"""The GPU table: one training step, ours beside Transformers (+ PEFT) eager, compiled, with Liger kernels and with grouped products (experts).

    python benchmarks/gpu.py                                         everything, one process per row and engine
    python benchmarks/gpu.py --cases 8b-lora --engines ours liger
    python benchmarks/gpu.py --cases 8b-lora --engines ours --profile    where the time goes, by kernel
    python benchmarks/gpu.py --output table.md                       the table into a file as well

Random weights at the real sizes, bf16. Ours keeps fp32 masters and moments; moe-full, 4b-full-bf16 and 8b-full-recompute have bf16 states
and no master, as the peers everywhere; "remainders" and "accumulated" (two micro-batches of 2 x 4096) have fp32 masters as bf16 parameters and 16 bits. "graphs" is ours with cuda_graph_impl="local". "0.6b-lora-512-packed": three to twelve documents of
random lengths, others in every step. FLOPs: 6 per matrix weight and token (4 when the base is frozen), causal attention at half. "estimate"
is the planner's, less its reserve for what the allocator does not see, beside the allocator's peak. Seconds to the first step: interpreter,
imports, model (built, filled, adapters, trainer), first step.
"""

import argparse
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time

START = time.time()
SPAWNED = float(os.environ.get("MCB_BENCH_SPAWNED", START))  # when the table started this row's process

QWEN3 = dict(num_key_value_heads=8, head_dim=128, vocab_size=151936)
SHAPES = {
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
                 vocab_size=2048, tie_word_embeddings=True),
    "0.6b": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, tie_word_embeddings=True, **QWEN3),
    "4b": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, tie_word_embeddings=True, **QWEN3),
    "8b": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, tie_word_embeddings=False, **QWEN3),
    # Layers of Qwen3-30B-A3B, eight of them.
    "30b-a3b": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=8, num_attention_heads=32, tie_word_embeddings=False, num_experts=128,
                    num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
                    **QWEN3 | dict(num_key_value_heads=4)),
}  # fmt: skip
SHAPES["8b-half"] = SHAPES["8b"] | dict(num_hidden_layers=18)  # what full training with fp32 masters leaves room for
FP8 = dict(fp8="hybrid", fp8_recipe="tensorwise")
REMAINDERS = dict(store_param_remainders=True)
CASES = {
    "tiny": dict(shape="tiny", tuner="full", batch=2, length=256),
    "tiny-lora": dict(shape="tiny", tuner="lora", batch=2, length=256),
    "8b-lora": dict(shape="8b", tuner="lora", batch=2, length=4096),
    "8b-lora-packed": dict(shape="8b", tuner="lora", batch=2, length=4096, documents=4),
    "8b-lora-recompute": dict(shape="8b", tuner="lora", batch=2, length=4096, recompute=True),
    "8b-lora-fp8": dict(shape="8b", tuner="lora", batch=2, length=4096, config=FP8),
    "8b-lora-fp8-param": dict(shape="8b", tuner="lora", batch=2, length=4096, config=FP8 | dict(fp8_param=True)),
    "8b-lora-fp8-delayed": dict(shape="8b", tuner="lora", batch=2, length=4096, config=FP8 | dict(fp8_recipe="delayed")),
    "8b-lora-fp8-blockwise": dict(
        shape="8b", tuner="lora", batch=2, length=4096, config=FP8 | dict(fp8="e4m3", fp8_recipe="blockwise")
    ),
    "8b-half-full": dict(shape="8b-half", tuner="full", batch=2, length=4096),
    "8b-half-full-fp8": dict(shape="8b-half", tuner="full", batch=2, length=4096, config=FP8),
    "8b-half-full-fp8-param": dict(shape="8b-half", tuner="full", batch=2, length=4096, config=FP8 | dict(fp8_param=True)),
    "8b-half-full-fp8-delayed": dict(
        shape="8b-half", tuner="full", batch=2, length=4096, config=FP8 | dict(fp8_recipe="delayed")
    ),
    "8b-half-full-fp8-blockwise": dict(
        shape="8b-half", tuner="full", batch=2, length=4096, config=FP8 | dict(fp8="e4m3", fp8_recipe="blockwise")
    ),
    "tiny-fp8": dict(shape="tiny", tuner="full", batch=2, length=256, config=FP8),
    "8b-full-recompute": dict(shape="8b", tuner="full", batch=1, length=4096, recompute=True, states="bf16"),
    "4b-full": dict(shape="4b", tuner="full", batch=2, length=4096),
    "4b-full-remainders": dict(shape="4b", tuner="full", batch=2, length=4096, options=REMAINDERS),
    "8b-full-remainders": dict(shape="8b", tuner="full", batch=1, length=4096, recompute=True, options=REMAINDERS),
    "4b-full-bf16": dict(shape="4b", tuner="full", batch=2, length=4096, states="bf16"),
    "0.6b-lora-512": dict(shape="0.6b", tuner="lora", batch=1, length=512),
    "0.6b-lora-512-packed": dict(shape="0.6b", tuner="lora", batch=1, length=512, documents=6, random=True),
    "0.6b-full": dict(shape="0.6b", tuner="full", batch=4, length=4096),
    "0.6b-full-accumulated": dict(shape="0.6b", tuner="full", batch=4, micro_batches=2, length=4096, options=REMAINDERS),
    "0.6b-full-packed": dict(shape="0.6b", tuner="full", batch=4, length=4096, documents=4),
    "moe-full": dict(shape="30b-a3b", tuner="full", batch=2, length=4096, states="bf16"),
    "moe-lora": dict(shape="30b-a3b", tuner="lora", batch=2, length=4096, targets=["q_proj", "k_proj", "v_proj", "o_proj"]),
}
ENGINES = ["ours", "graphs", "liger", "grouped", "eager", "compiled"]
MOE = ["moe-full", "moe-lora"]
# Left out unless named: what graphs do not change (kernels longer than their launches), and compilers that take minutes for a step
# another peer does faster.
LEFT_OUT = {
    "ours": ["8b-half-full-fp8-delayed", "8b-half-full-fp8-blockwise"],
    "grouped": [name for name in CASES if name not in MOE],
    "liger": MOE,
    "eager": MOE,
    "graphs": [name for name in CASES if name not in ("tiny", "tiny-lora", "0.6b-lora-512", "0.6b-lora-512-packed")],
    "compiled": ["tiny", "tiny-lora", "8b-lora-recompute", "4b-full", "0.6b-lora-512", *MOE],
}
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # dense bf16, the vendor's datasheets


def flops(case):
    """Forward + backward FLOPs of a step; causal attention counted at half."""
    s, tokens = SHAPES[case["shape"]], case["batch"] * case["length"]
    heads, groups, d, h = s["num_attention_heads"], s["num_key_value_heads"], s["head_dim"], s["hidden_size"]
    width = s["num_experts_per_tok"] * s["moe_intermediate_size"] if "num_experts" in s else s["intermediate_size"]
    layer = h * (heads + 2 * groups) * d + heads * d * h + 3 * h * width + h * s.get("num_experts", 0)
    matrices = s["num_hidden_layers"] * layer + h * s["vocab_size"]
    length = tokens // case["documents"] if "documents" in case else case["length"]
    attention = s["num_hidden_layers"] * 2 * heads * d * length  # QK^T and PV, half of the square, 2 FLOPs each
    return ((6 if case["tuner"] == "full" else 4) * matrices + 3 * attention) * tokens


HF = dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1e6,
          hidden_act="silu", attention_bias=False, torch_dtype="bfloat16")  # fmt: skip


def hf_fields(case):
    """config.json of the case."""
    fields = HF | SHAPES[case["shape"]]
    return fields | dict(model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"]) if "num_experts" in fields else fields


def hf_config(case):
    from transformers import AutoConfig

    fields = {key: value for key, value in hf_fields(case).items() if key not in ("architectures", "torch_dtype")}
    return AutoConfig.for_model(fields.pop("model_type"), **fields, dtype="bfloat16")


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
            if p.dtype == torch.float8_e4m3fn:  # codes, whose scale is 1
                p.copy_(torch.empty(p.shape, dtype=torch.bfloat16, device=p.device).normal_(0, 0.02))
            else:
                p.normal_(0, 0.02) if p.dim() > 1 else p.fill_(1)


def model_config(case):
    import tempfile

    import mcore_bridge as mb

    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(hf_fields(case), file)
        given = mb.hf_to_mcore_config(folder)
    recompute = (
        dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1) if case.get("recompute") else {}
    )
    return mb.ModelConfig(**given, params_dtype="bfloat16", **recompute, **case.get("config", {}))


def optimizer(case):
    states = ("main_params_dtype", "main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
    return dict(lr=1e-4, lr_decay_style="constant", train_iters=1000, **{name: case.get("states", "fp32") for name in states},
                **case.get("options", {}))  # fmt: skip


def lora_options(case):
    import mcore_bridge as mb

    targets = case.get("targets", ["all-linear"])
    return mb.LoraOptions(r=16, lora_alpha=32, target_modules=targets) if case["tuner"] == "lora" else None


def ends(case):
    """cu_seqlens of the packings that take turns: documents of one length, or packings of random ones."""
    import torch

    tokens, documents = case["batch"] * case["length"], case["documents"]
    if not case.get("random"):
        return [torch.linspace(0, tokens, documents + 1).int()]
    generator = torch.Generator().manual_seed(2)
    result = []
    for _ in range(64):
        count = int(torch.randint(documents // 2, 2 * documents + 1, (), generator=generator))
        inner = torch.randperm(tokens - 1, generator=generator)[: count - 1] + 1
        result.append(torch.cat([torch.tensor([0]), inner.sort().values, torch.tensor([tokens])]).int())
    return result


def ours(case, engine):
    import mcore_bridge as mb

    models = mb.get_mcore_model(model_config(case), device="cuda")
    fill(models[0].parameters())
    if case["tuner"] == "lora":
        mb.add_lora(models, lora_options(case))
    trainer = mb.Trainer(models, **optimizer(case), cuda_graph_impl="local" if engine == "graphs" else "none")
    ids, labels = batch(case)
    if "documents" in case:
        ids, labels = ids.view(1, -1), labels.view(1, -1)
    count = case.get("micro_batches", 1)
    micro = [dict(input_ids=rows, labels=targets) for rows, targets in zip(ids.chunk(count), labels.chunk(count), strict=True)]
    packings = itertools.cycle(
        [dict(packed_seq_params=mb.PackedSeqParams(e)) for e in ends(case)] if "documents" in case else [{}]
    )

    def step():
        packing = next(packings)
        return trainer.train_step([each | packing for each in micro]).loss

    return step


def estimate(case):
    """GiB the planner expects the allocator to reach."""
    import mcore_bridge as mb

    rows, length, documents = case["batch"], case["length"], case.get("documents", 1)
    if documents > 1:
        rows, length = 1, rows * length
    plan = mb.plan_layout(model_config(case), lora=lora_options(case), processes=1, micro_batch_size=rows // case.get("micro_batches", 1), global_batch_size=rows,
                          sequence_length=length, documents=documents, optimizer=optimizer(case), memory=80e9, gpu_kernels=True)  # fmt: skip
    memory = plan["stages"][plan["worst_stage"]]["memory"]
    return (memory["total"] - memory["reserve"]) / 2**30


def transformers(case, engine):
    import torch
    from transformers import AutoModelForCausalLM

    if engine == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3

        apply_liger_kernel_to_qwen3()
    with torch.device("cuda"):
        grouped = dict(experts_implementation="grouped_mm") if engine == "grouped" else {}
        model = AutoModelForCausalLM.from_config(hf_config(case), dtype=torch.bfloat16, attn_implementation="sdpa", **grouped)
    fill(model.parameters())
    model.train()
    if case.get("recompute"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if case["tuner"] == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, target_modules=case.get("targets", "all-linear"), task_type="CAUSAL_LM")
        )
    trainable = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trainable, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids, labels = (x.cuda() for x in batch(case))
    forward = torch.compile(model) if engine == "compiled" else model

    def step():
        loss = forward(input_ids=ids, labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    return step


# What a kernel's name says it is for; the first that fits.
PHASES = [
    ("experts' products", "GroupProblemShape"),
    ("attention", "sdpa|fmha|flash|dot_do_o|convert_dq"),
    ("permuting and combining rows", "PermuteRows"),
    ("optimizer", "adamw|Adam"),
    ("gradient norm", "Squares|lpnorm|LpNorm"),
    ("loss", "CrossEntropy|cross_entropy|oftmax"),
    ("q/k norm, rotation", "SplitQkv"),
    ("norms", "RmsNorm|rms_norm|GammaBeta|vectorized_layer_norm"),
    ("gated activation", "Gated|silu"),
    ("casts to FP8, their scales", "quantize|amax"),
    ("LoRA's B as one matrix", "LoraB"),
    ("which experts (top-k, sorting, counting)", "opk|opK|adixSort|scan|scatter|gather|index"),
    ("dense products, the router's too", "nvjet|gemm|cutlass|splitK"),
    ("copies, clearing", "Memcpy|Memset|copy|Fill"),
    ("additions and the rest", ""),
]


def profile(name, engine, step):
    """One step under the profiler; kernels by phase and by time, gaps between them, to stderr."""
    import torch
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
    gaps, end = [], spans[0][1]
    for (_, _, before), (start, stop, after) in zip(spans, spans[1:], strict=False):
        gaps.append((start - end, before[:60], after[:60]))
        end = max(end, stop)
    idle = sum(max(0, gap[0]) for gap in gaps)
    lines = [f"span {(end - spans[0][0]) / 1e3:.1f} ms, idle between kernels {idle / 1e3:.1f} ms; largest gaps:"]
    lines += [
        f"{gap / 1e3:9.3f} ms between {before} and {after}" for gap, before, after in sorted(gaps, reverse=True)[:8] if gap > 0
    ]
    total = sum(time for time, _ in kernels.values())
    lines += [f"{name} {engine}: {total / 1e3:.1f} ms in {sum(count for _, count in kernels.values())} kernels"]
    phases = dict.fromkeys((phase for phase, _ in PHASES), 0.0)
    for kernel, (spent, _) in kernels.items():
        phases[next(phase for phase, pattern in PHASES if re.search(pattern, kernel))] += spent
    lines += [f"{spent / 1e3:9.2f} ms {100 * spent / total:5.1f} %  {phase}" for phase, spent in phases.items() if spent > 0]
    for kernel, (spent, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:40]:
        lines.append(f"{spent / 1e3:9.2f} ms {count:6d} x  {kernel[:150]}")
    lines.append("host time by operation:")
    for each in sorted(report.key_averages(), key=lambda each: -each.self_cpu_time_total)[:15]:
        lines.append(f"{each.self_cpu_time_total / 1e3:9.2f} ms {each.count:6d} x  {each.key[:100]}")
    print("\n".join(lines), file=sys.stderr)


def measure(name, engine, steps, profiling):
    own = engine in ("ours", "graphs")
    marks = [SPAWNED, START]
    import torch

    import_ours() if own else __import__("transformers")
    torch.cuda.init()
    marks.append(time.time())
    case = CASES[name]
    step = ours(case, engine) if own else transformers(case, engine)
    torch.cuda.synchronize()
    marks.append(time.time())
    losses = [step()]
    torch.cuda.synchronize()
    marks.append(time.time())
    # Graphs are recorded, and cuDNN's plans made, after some steps of a shape.
    warmup = 24 if case.get("random") else 5 if engine == "graphs" else 2
    losses += [step() for _ in range(warmup)]
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if profiling:
        profile(name, engine, step)
    return dict(case=name, engine=engine, seconds=statistics.median(times), peak=torch.cuda.max_memory_allocated() / 2**30,
                phases=[later - earlier for earlier, later in zip(marks, marks[1:], strict=False)],
                estimate=estimate(case) if own else None, losses=[losses[0], losses[-1]])  # fmt: skip


def import_ours():
    import mcore_bridge as mb

    return mb.Trainer  # names load on first use


COLUMNS = ["case", "engine", "ms/step", "tok/s", "TFLOP/s", "MFU", "peak GiB", "estimate", "first step: start + import + model + step s",
           "first loss", "last loss"]  # fmt: skip


def row(result, peak_tflops):
    case = CASES[result["case"]]
    tokens, work = case["batch"] * case["length"], flops(case) / result["seconds"] / 1e12
    mfu = f"{100 * work / peak_tflops:.0f} %" if not math.isnan(peak_tflops) else ""
    planned = result["estimate"]
    planned = f"{planned:.1f} ({100 * (planned / result['peak'] - 1):+.0f} %)" if planned else ""
    phases = " + ".join(f"{seconds:.1f}" for seconds in result["phases"]) + f" = {sum(result['phases']):.1f}"
    cells = [result["case"], result["engine"], f"{result['seconds'] * 1e3:.1f}", f"{tokens / result['seconds']:,.0f}", f"{work:.0f}", mfu,
             f"{result['peak']:.1f}", planned, phases, *(f"{loss:.4f}" for loss in result["losses"])]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, help="default: all but the tiny ones")
    parser.add_argument(
        "--engines", nargs="*", choices=ENGINES, help="default: all; naming both measures what is left out otherwise"
    )
    parser.add_argument("--output", help="write the table to this file too")
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
    output = open(arguments.output, "w") if arguments.output else None  # noqa: SIM115

    def write(line):
        print(line, flush=True)
        if output:
            print(line, file=output, flush=True)

    write(f"`{' '.join(sys.argv)}`, commit {commit or 'unknown'}, torch {torch.__version__}, {device}\n")
    write("| " + " | ".join(COLUMNS) + " |")
    write("|---" * len(COLUMNS) + "|")
    given = arguments.cases or [name for name in CASES if not name.startswith("tiny")]
    # Ours first, the compilers last: what does not fit into the time is theirs.
    for engine in [engine for engine in ENGINES if engine in (arguments.engines or ENGINES)]:
        for case in given:
            if engine not in ("ours", "graphs") and CASES[case].keys() & {"documents", "config", "options"}:
                continue  # the peers are measured on the same tokens unpacked
            if case in LEFT_OUT.get(engine, []) and not (arguments.cases and arguments.engines):
                continue
            write(measured(case, engine, arguments, peak))
    write(f"\n{time.time() - START:.0f} s in all")


def measured(case, engine, arguments, peak):
    """The table's line of one process."""
    left = min(arguments.timeout, arguments.budget - (time.time() - START))
    if left < 20:
        return f"| {case} | {engine} | not run: the time is up |"
    command = [sys.executable, __file__, "--one", case, engine, "--steps", str(arguments.steps)] + [
        "--profile"
    ] * arguments.profile
    environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "MCB_BENCH_SPAWNED": str(time.time())}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=True, env=environment)
    except subprocess.TimeoutExpired:
        return f"| {case} | {engine} | more than {left:.0f} s |"
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        return f"| {case} | {engine} | failed: {lines[-1][:200]} |"
    if arguments.profile:
        print(done.stderr, flush=True)
    return row(json.loads(done.stdout.strip().splitlines()[-1]), peak)


if __name__ == "__main__":
    main()
