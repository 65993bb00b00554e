"""Core attention against float64 of its formula. MCB_TEST_DEVICE=cuda runs cuDNN's graph API (packed rows, windows) and, without it,
flash attention."""

import os

import pytest
import torch
from mcore_bridge._core import kernels
from tiny import relative

DEVICE = os.environ.get("MCB_TEST_DEVICE", "cpu")
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.bfloat16, torch.float16]


def random(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def expected(q, k, v, ends, window):
    """Softmax attention of every document by itself, float64 on the CPU."""
    s, b, heads, d = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    distance = torch.arange(s)[:, None] - torch.arange(s)[None]
    allowed = distance >= 0
    if window >= 0:
        allowed &= distance <= window
    if ends is not None:
        document = torch.bucketize(torch.arange(s), torch.tensor(ends), right=True)
        allowed &= document[:, None] == document[None]
    scores = torch.einsum("ibnd,jbnd->bnij", q, k) / d**0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("bnij,jbnd->ibnd", weights, v).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "ends,window",
    [
        ([0, 384], -1),
        ([0, 100, 101, 384], -1),  # a document of one token; lengths that no tile divides
        ([0, 64, 128, 200, 256, 384], 20),
        ([0, 150, 150, 384, 384, 384, 384, 384, 384], -1),  # empty documents between and behind
        ([0, 150, 150, 384, 384, 384, 384, 384, 384], 20),
        ([0, 150, 384], 400),  # wider than every document
        (None, 33),
        (None, -1),
    ],
)
@pytest.mark.parametrize("heads,groups,d", [(4, 4, 64), (8, 2, 128)])
@pytest.mark.parametrize("cudnn", [False, True] if DEVICE == "cuda" else [False])
def test_core_attention(ends, window, heads, groups, d, dtype, cudnn):
    s, b = 384, 1 if ends else 2
    # The values are columns of a wider row, as after the fused projection.
    mixed = random(s, b, groups, 3 * d, dtype=dtype, seed=2)
    given = [random(s, b, heads, d, dtype=dtype, seed=0), random(s, b, groups, d, dtype=dtype, seed=1), mixed[..., d : 2 * d]]
    grad = random(s, b, heads * d, dtype=dtype, seed=3)
    inputs = [x.detach().requires_grad_(True) for x in given]
    row = kernels.PackedRow(torch.tensor(ends, dtype=torch.int32, device=DEVICE), cudnn) if ends else None
    if DEVICE == "cuda" and cudnn:
        assert kernels.cudnn_attention_here(DEVICE)
    out = kernels.core_attention(*inputs, row, window)
    out.backward(grad)
    wide = [x.detach().cpu().double().requires_grad_(True) for x in given]
    exact = expected(*wide, ends, window)
    exact.backward(grad.cpu().double())
    bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert relative(out.cpu(), exact) < bound
    for ours, theirs in zip(inputs, wide):
        assert relative(ours.grad.cpu(), theirs.grad) < bound
