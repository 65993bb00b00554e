"""FP8 kernels and products, packed attention, kernels bound by memory: their rates on this GPU beside the floor.

    python benchmarks/kernels.py [fp8] [attention] [memory]

Medians of CUDA events over distinct inputs. Bytes: each input read once, each output written once. Attention FLOPs: causal, halved,
by document; backward 2.5 times forward."""

# ruff: noqa: B023 - what is timed runs at once

import statistics
import sys

import torch
from mcore_bridge._core import kernels


def milliseconds(work, repeat=20):
    for i in range(3):
        work(i)
    times = []
    for i in range(repeat):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work(i)
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in times)


def fp8():
    rows = 8192
    print("| quantising 8192 x | elements | straight | turned | both | amax alone |\n|---|---|---|---|---|---|")
    for columns in (4096, 12288, 24576):
        xs = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        reference = torch.full((1,), 5.0, device="cuda")
        amax = torch.zeros(1, device="cuda")
        for scaling in ("tensor", "rows", "blocks"):
            cells = []
            for straight, turned in ((True, False), (False, True), (True, True)):
                time = milliseconds(lambda i: kernels.fp8_quantize(xs[i % 4], scaling, False, straight, turned, reference, amax))
                cells.append(f"{time:.3f} ms, {rows * columns * (2 + straight + turned) / time / 1e9:.2f} TB/s")
            time = milliseconds(lambda i: kernels.fp8_raise_amax(xs[i % 4], amax))
            print(f"| {columns} | {scaling} | {' | '.join(cells)} | {time:.3f} ms, {rows * columns * 2 / time / 1e9:.2f} TB/s |")
    print("\n| product m x k x n | bf16 | tensor | blocks | tensor, onto | fp32 sum |\n|---|---|---|---|---|---|")
    like = torch.empty(0, device="cuda", dtype=torch.bfloat16)
    for m, k, n in ((8192, 4096, 24576), (8192, 12288, 4096), (8192, 4096, 6144), (8192, 24576, 4096), (24576, 8192, 4096)):
        x, w = (torch.randn(r, k, device="cuda", dtype=torch.bfloat16) for r in (m, n))
        reference = torch.full((1,), 5.0, device="cuda")
        one = {}
        for scaling in ("tensor", "rows", "blocks"):
            one[scaling] = [kernels.fp8_quantize(t, scaling, False, True, False, reference, None)[:2] for t in (x, w)]
        y = torch.zeros(m, n, device="cuda", dtype=torch.bfloat16)
        total = torch.zeros(m, n, device="cuda")
        works = [
            lambda i: torch.mm(x, w.t()),
            lambda i: kernels.fp8_matmul(one["tensor"][0], "tensor", one["tensor"][1], "tensor", m, None, like),
            lambda i: kernels.fp8_matmul(one["rows"][0], "rows", one["blocks"][1], "blocks", m, None, like),
            lambda i: kernels.fp8_matmul(one["tensor"][0], "tensor", one["tensor"][1], "tensor", m, y, like),
            lambda i: kernels.fp8_accumulate(total, one["tensor"][0], one["tensor"][1], "tensor", True),
        ]
        cells = []
        for work in works:
            time = milliseconds(work, 10)
            cells.append(f"{time:.3f} ms, {2 * m * n * k / time / 1e9:.0f}")
        print(f"| {m} x {k} x {n} | {' | '.join(cells)} |")


def attention():
    tokens, heads, groups, d = 8192, 32, 8, 128
    print("\n| documents | window | cuDNN forward | backward | flash forward | backward |\n|---|---|---|---|---|---|")
    for documents, window in ((1, -1), (2, -1), (4, -1), (16, -1), (64, -1), (2, 1023), (16, 127)):
        ends = torch.linspace(0, tokens, documents + 1).int().cuda()
        pairs = tokens * (tokens / documents) / 2
        if window >= 0 and window < tokens / documents:
            pairs = tokens * (window + 1 - (window + 1) ** 2 / 2 / (tokens / documents))
        flops = 4 * heads * d * pairs
        cells = []
        for cudnn in (True, False):
            q, k, v = (
                torch.randn(tokens, 1, h, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                for h in (heads, groups, groups)
            )
            row = kernels.PackedRow(ends, cudnn)
            out = kernels.core_attention(q, k, v, row, window)
            grad = torch.randn_like(out)
            time = milliseconds(lambda i: kernels.core_attention(q, k, v, row, window))
            cells.append(f"{time:.3f} ms, {flops / time / 1e9:.0f}")
            time = milliseconds(lambda i: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
            cells.append(f"{time:.3f} ms, {2.5 * flops / time / 1e9:.0f}")
        print(f"| {documents} | {window} | {' | '.join(cells)} |")


def memory():
    """What moves bytes and computes next to nothing."""
    bf16 = dict(device="cuda", dtype=torch.bfloat16)

    def line(name, bytes_moved, work):
        time = milliseconds(work)
        print(f"| {name} | {time:.3f} ms | {bytes_moved / time / 1e9:.2f} TB/s |")

    print("\n| kernel | | |\n|---|---|---|")
    tokens, d = 8192, 128
    for heads, groups in ((32, 8), (16, 8), (32, 4)):
        mixed = [torch.randn(tokens, 1, (heads + 2 * groups) * d, **bf16) for _ in range(4)]
        cos, sin = (torch.rand(tokens, 1, 1, d // 2, **bf16) for _ in range(2))
        weights = [torch.ones(d, **bf16) for _ in range(2)]
        options = (groups, heads // groups, d, cos, sin, False, *weights, 1e-6)
        grads = [torch.randn(tokens, 1, n, d, **bf16) for n in (heads, groups, groups)]
        size = mixed[0].numel() * 2
        rotated = tokens * (heads + groups) * d * 2
        line(f"q/k norm and rotation, {heads}/{groups} heads", 2 * rotated,
             lambda i: kernels.split_qkv_forward(mixed[i % 4], *options, True))  # fmt: skip
        line("the same, backward", 2 * size + rotated, lambda i: kernels.split_qkv_backward(*grads, mixed[i % 4], *options))
    hidden, topk = 2048, 8
    places = tokens * topk
    order = torch.randperm(places, device="cuda")
    permutation = kernels.Permutation(order, order.argsort(), topk, False)
    x, rows = torch.randn(tokens, hidden, **bf16), torch.randn(places, hidden, **bf16)
    weights = torch.rand(tokens, topk, device="cuda")
    one, all_places = tokens * hidden * 2, places * hidden * 2
    line("tokens to 8 rows each", one + all_places, lambda i: kernels.spread_rows(x, None, permutation))
    line("weighted rows to tokens", one + all_places, lambda i: kernels.combine_rows(rows, weights, permutation))
    line("the same, backward", one + 2 * all_places, lambda i: kernels.combine_rows_backward(x, rows, weights, permutation))
    number = 1 << 28
    for name, dtypes in (("fp32, bf16 parameters", [torch.float32] * 4), ("all bf16", [torch.bfloat16] * 4)):
        state = [torch.zeros(number, device="cuda", dtype=dtype) for dtype in dtypes]
        copies = [torch.zeros(number, **bf16)] if dtypes[0] == torch.float32 else [None]
        scalar = [torch.tensor(value, device="cuda") for value in (1.0, 0.0, 1.0)]
        moved = number * (7 * dtypes[0].itemsize + (2 if copies[0] is not None else 0))
        line(f"AdamW, {name}", moved,
             lambda i: kernels.fused_adamw(*[[each] for each in state], copies, 1e-3, 0.9, 0.95, 1e-8, 0.1, *scalar))  # fmt: skip
        line(f"squared norm, {name}", number * dtypes[0].itemsize, lambda i: kernels.squared_norm([state[0]]))


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for name in sys.argv[1:] or ["fp8", "attention", "memory"]:
        {"fp8": fp8, "attention": attention, "memory": memory}[name]()
