"""Fused operations against float64 autograd of their formulas. MCB_TEST_DEVICE=cuda runs the CUDA kernels.

Low precision is compared with float64 on the same rounded inputs, so the bound is the rounding of the result alone."""

import os

import pytest
import torch
import torch.nn.functional as F
from mcore_bridge._core import kernels
from tiny import relative

DEVICE = os.environ.get("MCB_TEST_DEVICE", "cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "bf16", "fp16"])


def random(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def wide(tensor):
    return None if tensor is None else tensor.detach().cpu().double().requires_grad_(True)


def close(actual, expected, tolerance):
    assert relative(actual.cpu(), expected) < tolerance


def rms(x, weight, epsilon, zero_centered=False):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * (weight + 1 if zero_centered else weight)


@DTYPES
@pytest.mark.parametrize("rows,columns", [(5, 64), (3, 1024), (700, 2048), (2, 4104), (2, 12288)])
@pytest.mark.parametrize("delta,zero_centered", [(False, True), (True, False)])
def test_rms_norm(dtype, rows, columns, delta, zero_centered):
    x, weight = random(rows, columns, dtype=dtype, seed=0), random(columns, dtype=dtype, seed=1)
    other = random(rows, columns, dtype=dtype, seed=2) if delta else None
    grad, grad_residual = random(rows, columns, dtype=dtype, seed=3), random(rows, columns, dtype=dtype, seed=4)
    normed, total, rstd = kernels.rms_norm_forward(x, other, weight, 1e-5, zero_centered)
    if delta:
        assert torch.equal(total, x + other)
    wide_x, wide_weight = wide(total), wide(weight)
    expected = rms(wide_x, wide_weight, 1e-5, zero_centered)
    close(normed, expected, TOLERANCE[dtype])
    assert torch.equal(kernels.rms_norm_apply(total, rstd, weight, zero_centered), normed)
    (expected * grad.cpu().double() + wide_x * grad_residual.cpu().double()).sum().backward()
    grad_x, grad_weight, again = kernels.rms_norm_backward(grad, total, rstd, weight, grad_residual, zero_centered, True, True)
    close(grad_x, wide_x.grad, TOLERANCE[dtype])
    close(grad_weight, wide_weight.grad, TOLERANCE[dtype])
    assert torch.equal(again, normed)


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("rows,width", [(3, 24), (130, 512)])
def test_gated_activation(dtype, activation, rows, width):
    x, grad = random(rows, 2 * width, dtype=dtype, seed=0), random(rows, width, dtype=dtype, seed=1)
    wide_x = wide(x)
    gate, up = wide_x.chunk(2, -1)
    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}[activation]
    expected = act(gate) * up
    tolerance = 2 * TOLERANCE[dtype]  # the reference rounds the activation as well
    close(kernels.gated_forward(x, activation), expected, tolerance)
    (expected * grad.cpu().double()).sum().backward()
    grad_x, out = kernels.gated_backward(grad, x, activation, True)
    close(grad_x, wide_x.grad, tolerance)
    close(out, expected, tolerance)


def rotated(x, cos, sin, interleaved):
    half = cos.size(-1)
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return torch.cat([turned, x[..., 2 * half :]], -1)


@DTYPES
@pytest.mark.parametrize("d,share,interleaved", [(64, 1.0, False), (128, 1.0, False), (128, 0.5, False), (256, 1.0, True),
                                                  (80, 1.0, False), (128, 0.0, False)])  # fmt: skip
@pytest.mark.parametrize("norm", [False, True])
def test_split_qkv(dtype, d, share, interleaved, norm):
    s, b, groups, per_group, half = 7, 2, 2, 3, int(d * share) // 2
    mixed = random(s, b, groups * (per_group + 2) * d, dtype=dtype, seed=0)
    angles = torch.rand(s, b if norm else 1, 1, max(1, half), generator=torch.Generator().manual_seed(1)) * 6
    cos, sin = (angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)) if half else (None, None)
    weights = [random(d, dtype=dtype, seed=2 + i) if norm else None for i in range(2)]
    grads = [random(s, b, heads, d, dtype=dtype, seed=5 + i) for i, heads in enumerate([groups * per_group, groups, groups])]
    arguments = (groups, per_group, d, cos, sin, interleaved, *weights, 1e-6)

    wide_mixed, wide_weights = wide(mixed), [wide(weight) for weight in weights]
    parts = wide_mixed.view(s, b, groups, per_group + 2, d)
    expected = [parts[..., :per_group, :].flatten(2, 3), parts[..., per_group, :], parts[..., per_group + 1, :]]
    for i in range(2):
        if norm:
            expected[i] = rms(expected[i], wide_weights[i], 1e-6)
        if half:
            expected[i] = rotated(expected[i], cos.cpu().double(), sin.cpu().double(), interleaved)
    tolerance = 3 * TOLERANCE[dtype]  # the reference rounds between norm and rotation
    for view in (False, True):
        for ours, theirs in zip(kernels.split_qkv_forward(mixed, *arguments, view), expected, strict=True):
            close(ours, theirs, tolerance)
    sum((e * g.cpu().double()).sum() for e, g in zip(expected, grads, strict=True)).backward()
    grad_mixed, *grad_weights = kernels.split_qkv_backward(*grads, mixed if norm else None, *arguments)
    close(grad_mixed, wide_mixed.grad, tolerance)
    for ours, theirs in zip(grad_weights, wide_weights, strict=True):
        assert (ours is None) == (theirs is None)
        if norm:
            close(ours, theirs.grad, tolerance)


@DTYPES
@pytest.mark.parametrize("rows,columns,real", [(6, 1000, 1000), (4, 40008, 40001)])
def test_cross_entropy(dtype, rows, columns, real):
    logits = random(rows, columns, dtype=dtype, seed=0) * 4
    labels = torch.randint(0, real, (rows,), generator=torch.Generator().manual_seed(1))
    labels[1] = -100
    weight = torch.rand(rows, generator=torch.Generator().manual_seed(2))
    wide_logits = wide(logits)
    expected = F.cross_entropy(wide_logits[:, :real], labels, reduction="none")
    (expected * weight.double()).sum().backward()
    on_device = labels.to(DEVICE)

    maximum, total, target = (t.cpu() for t in kernels.softmax_statistics(logits, on_device, 0, real))
    losses = (total.double().log() + maximum - target).masked_fill(labels < 0, 0)
    close(losses, expected, 1e-5)
    ours = logits.clone()
    kernels.softmax_gradient_(ours, on_device, 0, real, maximum.to(DEVICE), total.to(DEVICE), weight.to(DEVICE))
    close(ours, wide_logits.grad, 2 * TOLERANCE[dtype])
    assert not ours[:, real:].any() and not ours[1].any()

    both = logits.clone()
    statistics = kernels.softmax_statistics_and_gradient_(
        both, on_device, real, torch.tensor(0.25, dtype=torch.float64, device=DEVICE)
    )
    for ours, theirs in zip(statistics, (maximum, total, target), strict=True):
        close(ours, theirs, 1e-6)
    wide_logits.grad = None
    (F.cross_entropy(wide_logits[:, :real], labels, reduction="none") * 0.25).sum().backward()
    close(both, wide_logits.grad, 2 * TOLERANCE[dtype])

    # Two shards of the vocabulary: each finds its own label, and their statistics join.
    half = (columns // 2) // 8 * 8
    shards = [logits[:, :half].contiguous(), logits[:, half:].contiguous()]
    found = [
        kernels.softmax_statistics(shards[0], on_device, 0, half),
        kernels.softmax_statistics(shards[1], on_device, half, real - half),
    ]
    top = torch.maximum(found[0][0], found[1][0])
    joined = sum(part[1] * (part[0] - top).exp() for part in found)
    close(joined.log() + top, torch.logsumexp(wide_logits.detach()[:, :real], 1), 1e-6)
    close(found[0][2] + found[1][2], target, 1e-6)


@pytest.mark.parametrize("parts,blocks,widths", [([True, True, True], 2, [6, 2, 2]), ([True, False, True], 2, [6, 2, 2]),
                                                 ([False, True], 1, [8, 8]), ([True], 1, [12])])  # fmt: skip
def test_lora_b(parts, blocks, widths):
    """Against the product part by part, and the gradient as its transpose; bf16 to an fp32 sum."""
    r, tokens = 4, 5
    rows = [blocks * width for width, part in zip(widths, parts, strict=True) if part]
    b = random(sum(rows), r, dtype=torch.bfloat16, seed=0)
    low = random(tokens, len(rows) * r, dtype=torch.bfloat16, seed=1)
    expanded = kernels.expand_b(b, parts, blocks, widths, 0.5)
    ours = (low.cpu().double() @ expanded.cpu().double().T).view(tokens, blocks, -1)
    compact, column, row = b.cpu().double().view(blocks, -1, r), 0, 0
    start = 0
    for width, part in zip(widths, parts, strict=True):
        got = ours[..., start : start + width]
        start += width
        if not part:
            assert not got.any()
            continue
        part_b = compact[:, row : row + width]
        theirs = 0.5 * torch.einsum("tr,bwr->tbw", low.cpu().double()[:, column : column + r], part_b)
        torch.testing.assert_close(got, theirs)
        row, column = row + width, column + r

    grad = random(*expanded.shape, dtype=torch.bfloat16, seed=2)
    total = random(*b.shape, dtype=torch.float32, seed=3)
    wide_b = torch.zeros(b.shape, dtype=torch.float64)
    for i in range(b.numel()):  # the transpose of a linear map, column by column
        unit = torch.zeros(b.numel(), dtype=torch.float32)
        unit[i] = 1
        wide_b.view(-1)[i] = (
            kernels.expand_b(unit.view(b.shape), parts, blocks, widths, 0.5).double() * grad.cpu().double()
        ).sum()
    summed, alone = total.clone(), torch.full_like(b, float("nan"))
    kernels.collect_b(grad, summed, parts, blocks, widths, 0.5, True)
    kernels.collect_b(grad, alone, parts, blocks, widths, 0.5, False)
    close(summed, wide_b + total.cpu(), 1e-6)
    close(alone, wide_b, 4e-3)


@DTYPES
@pytest.mark.parametrize("topk,columns", [(1, 64), (6, 2056)])
@pytest.mark.parametrize("padded", [False, True])
def test_permuted_rows(dtype, topk, columns, padded):
    """There and back against indexing; padded: some places dropped, some rows without a place."""
    tokens = 37
    generator = torch.Generator().manual_seed(0)
    places, more = tokens * topk, 9 if padded else 0
    rows = places + more
    inverse = torch.randperm(rows, generator=generator)[:places]
    if padded:
        inverse[::5] = rows
    order = torch.full((rows + 1,), places)
    order[inverse] = torch.arange(places)
    permutation = kernels.Permutation(order[:rows].to(DEVICE), inverse.to(DEVICE), topk, padded)
    x, y = random(tokens, columns, dtype=dtype, seed=1), random(rows, columns, dtype=dtype, seed=2)
    grad = random(tokens, columns, dtype=dtype, seed=3)
    weights = torch.rand(tokens, topk, generator=generator).to(DEVICE)
    kept = inverse < rows
    token = torch.arange(tokens).repeat_interleave(topk)

    spread = torch.zeros(rows, columns, dtype=dtype).index_copy(0, inverse[kept], x.cpu()[token[kept]])
    assert torch.equal(kernels.spread_rows(x, None, permutation).cpu(), spread)
    wide_y, wide_weights = wide(y), wide(weights)
    tolerance = 3 * TOLERANCE[dtype]  # the reference rounds the weights
    for given in (None, weights):
        factors = torch.ones(places, 1) if given is None else wide_weights.flatten().unsqueeze(1)
        weighted = wide_y[inverse[kept]] * factors[kept]
        expected = torch.zeros(tokens, columns, dtype=torch.float64).index_add(0, token[kept], weighted)
        close(kernels.combine_rows(y, given, permutation), expected, tolerance)
    (expected * grad.cpu().double()).sum().backward()
    grad_y, grad_weights = kernels.combine_rows_backward(grad, y, weights, permutation)
    close(grad_y, wide_y.grad, tolerance)
    close(grad_weights, wide_weights.grad, tolerance)
    assert grad_weights.dtype == weights.dtype and not grad_weights.flatten()[~kept].any()


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wide_weight", [False, True])
def test_router_logits(dtype, bias, wide_weight):
    """As precise as fp32 whatever x and the weight are in."""
    of_weight = torch.float32 if wide_weight else dtype
    x, weight = random(70, 256, dtype=dtype, seed=0), random(24, 256, dtype=of_weight, seed=1)
    given = [x, weight] + ([random(24, dtype=of_weight, seed=2)] if bias else [])
    grad = random(70, 24, dtype=torch.float32, seed=3)
    leaves = [each.clone().requires_grad_(True) for each in given]
    logits = kernels.router_logits(*leaves, *([] if bias else [None]))
    wides = [wide(each) for each in given]
    expected = F.linear(*wides)
    assert logits.dtype == torch.float32
    close(logits, expected, 2e-6)
    logits.backward(grad)
    expected.backward(grad.cpu().double())
    for leaf, each in zip(leaves, wides, strict=True):
        # The gradient is rounded once, from a sum in which nothing was.
        rounded = each.grad.to(leaf.dtype)
        assert leaf.grad.dtype == leaf.dtype
        assert (leaf.grad.cpu() != rounded).float().mean() < (0.9 if leaf.dtype == torch.float32 else 0.02)
        close(leaf.grad, each.grad, TOLERANCE[leaf.dtype])


def test_squared_norm():
    sizes = [(3,), (0,), (130, 70), (200001,)] + [(4, 4)] * 200
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    tensors = [random(*size, dtype=dtypes[i % 3], seed=i) for i, size in enumerate(sizes)]
    tensors.append(random(100, dtype=torch.bfloat16, seed=1)[1:])  # not aligned
    expected = sum(tensor.cpu().double().square().sum() for tensor in tensors)
    actual = kernels.squared_norm(tensors)
    assert actual.dtype == torch.float64
    assert abs(actual.item() / expected.item() - 1) < 1e-5  # pieces of 200,000 numbers are summed in fp32


@pytest.mark.parametrize("low", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_fused_adamw(low):
    sizes = [(3,), (130, 70), (5000,)] + [(4, 4)] * 60
    values = [random(*size, dtype=torch.float32, seed=i) for i, size in enumerate(sizes)]
    peers = [value.clone().requires_grad_(True) for value in values]
    optimizer = torch.optim.AdamW(peers, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    moments = [[torch.zeros_like(value) for value in values] for _ in range(2)]
    parameters = [value.to(low) if low else None for value in values]
    scalar = lambda value: torch.tensor(float(value), device=DEVICE)  # noqa: E731
    for step in range(1, 4):
        grads = [random(*size, dtype=torch.float32, seed=100 * step + i) for i, size in enumerate(sizes)]
        for peer, grad in zip(peers, grads, strict=True):
            peer.grad = grad / 4
        optimizer.step()
        for skip in (1, 0):  # a skipped step changes nothing
            kernels.fused_adamw(values, [g.clone() for g in grads], *moments, parameters, 1e-2, 0.9, 0.95, 1e-8, 0.1,
                                scalar(4), scalar(skip), scalar(step))  # fmt: skip
    for value, peer, parameter in zip(values, peers, parameters, strict=True):
        close(value, peer.detach().cpu().double(), 1e-6)
        if low:
            assert torch.equal(parameter, value.to(low))


@pytest.mark.skipif(DEVICE == "cpu", reason="the fused operation of libtorch that serves the CPU takes float32 only")
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("halves", ["", "g", "mv", "gmv", "wgmv", "wgm", "w"])
def test_fused_adamw_in_mixed_precision(low, halves):
    """One step from given moments, in double precision and rounded once. `halves`: master w, gradient g, moments m, v."""
    sizes = [(3,), (130, 71), (5000,), (64, 64)]
    dtypes = {name: low if name in halves else torch.float32 for name in "wgmv"}
    values, grads, first, second = (
        [random(*size, dtype=dtype, seed=100 * kind + i) for i, size in enumerate(sizes)]
        for kind, dtype in enumerate(dtypes.values())
    )
    second = [each.abs() for each in second]
    parameters = [None if "w" in halves else torch.empty_like(value, dtype=low) for value in values]
    expected = []
    for w, g, m, v in zip(values, grads, first, second, strict=True):
        w, g, m, v = (x.cpu().double() for x in (w, g, m, v))
        g = g / 4
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w * (1 - 1e-2 * 0.1) - 1e-2 / (1 - 0.9**3) * m / (v.sqrt() / (1 - 0.95**3) ** 0.5 + 1e-8)
        expected.append((w, m, v))
    scalar = lambda value: torch.tensor(float(value), device=DEVICE)  # noqa: E731
    kernels.fused_adamw(values, grads, first, second, parameters, 1e-2, 0.9, 0.95, 1e-8, 0.1, scalar(4), scalar(0), scalar(3))
    bound = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
    for (w, m, v), value, one, two, parameter in zip(expected, values, first, second, parameters, strict=True):
        close(value, w, bound[dtypes["w"]])
        close(one, m, bound[dtypes["m"]])
        close(two, v, bound[dtypes["v"]])
        assert parameter is None or torch.equal(parameter, value.to(low))


def test_a_master_is_its_bf16_copy_and_16_bits():
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**31), 2**31, (400_000,), generator=generator, dtype=torch.int64).int()
    special = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x3F808000, 0x3F818000, 0x7F7F7FFF, 0x7F7F8000, 0x7F800000, 0x007FFFFF]
    bits = torch.cat([bits, torch.tensor(special).int(), torch.tensor(special).int() | -(2**31)])
    master = bits.view(torch.float32)
    master = torch.cat([master[~master.isnan()], torch.tensor([float("nan")])]).to(DEVICE)
    parameter = torch.empty_like(master, dtype=torch.bfloat16)
    remainder = torch.empty_like(master, dtype=torch.int16)
    kernels.split_master(master, parameter, remainder)
    assert torch.equal(kernels.join_master(parameter, remainder)[:-1].view(torch.int32), master[:-1].view(torch.int32))
    assert parameter[-1].isnan() and kernels.join_master(parameter, remainder)[-1].isnan()
    # To nearest: as bf16 rounds but for ties, which go away from zero.
    low = master.view(torch.int32) & 0xFFFF
    rounded = master.bfloat16()
    assert torch.equal(parameter[:-1][low[:-1] != 0x8000], rounded[:-1][low[:-1] != 0x8000])
    tie = (low == 0x8000).nonzero().flatten()
    assert len(tie) > 4 and torch.equal(
        parameter[tie].float().abs(), (master[tie].view(torch.int32) + 0x8000).view(torch.float32).abs()
    )
    # Any other NaN stays one too.
    other = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7F808000, -1], dtype=torch.int64).int().view(torch.float32).to(DEVICE)
    kernels.split_master(other, parameter[:4], remainder[:4])
    assert parameter[:4].isnan().all() and kernels.join_master(parameter[:4], remainder[:4]).isnan().all()


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no kernel for it on the CPU, where the optimizer joins and splits")
@pytest.mark.parametrize("halves", ["", "gmv"])
def test_fused_adamw_of_remainders_is_that_of_masters(halves):
    sizes = [(3,), (130, 71), (5000,), (65541,)]
    dtypes = {name: torch.bfloat16 if name in halves else torch.float32 for name in "wgmv"}
    masters, grads, first, second = (
        [random(*size, dtype=dtype, seed=100 * kind + i) for i, size in enumerate(sizes)]
        for kind, dtype in enumerate(dtypes.values())
    )
    masters, grads, first, second = ([each.flatten() for each in one] for one in (masters, grads, first, second))
    second = [each.abs() for each in second]
    again = [[each.clone() for each in one] for one in (grads, first, second)]
    parameters, copies = ([torch.empty_like(value, dtype=torch.bfloat16) for value in masters] for _ in range(2))
    remainders = [torch.empty_like(value, dtype=torch.int16) for value in masters]
    for master, parameter, remainder in zip(masters, parameters, remainders, strict=True):
        kernels.split_master(master, parameter, remainder)
    scalar = lambda value: torch.tensor(float(value), device=DEVICE)  # noqa: E731
    numbers = (1e-2, 0.9, 0.95, 1e-8, 0.1, scalar(4), scalar(0), scalar(3))
    kernels.fused_adamw(masters, grads, first, second, copies, *numbers)
    kernels.fused_adamw(remainders, *again, parameters, *numbers)
    for master, parameter, remainder, copy in zip(masters, parameters, remainders, copies, strict=True):
        assert torch.equal(kernels.join_master(parameter, remainder), master)
        assert (parameter != copy).float().mean() < 1e-3  # ties
    assert all(torch.equal(one, two) for one, two in zip(first + second, again[1] + again[2], strict=True))


def test_kernels_are_built_where_the_device_is_a_gpu():
    assert kernels.cuda_built() == bool(torch.version.cuda) or DEVICE == "cpu"
