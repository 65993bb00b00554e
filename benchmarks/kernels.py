"""FP8 kernels and products, packed attention: their rates on this GPU beside the floor.

    python benchmarks/kernels.py [fp8] [attention]

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


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for name in sys.argv[1:] or ["fp8", "attention"]:
        {"fp8": fp8, "attention": attention}[name]()
