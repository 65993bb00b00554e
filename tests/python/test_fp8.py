"""FP8: the quantisers against closed forms, the products against float64 of the same FP8 numbers, models against their own dtype.

MCB_TEST_DEVICE=cuda runs the CUDA kernels and cuBLASLt (compute capability 9.0)."""

import os

import mcore_bridge as mb
import pytest
import tiny
import torch
from mcore_bridge import _core
from mcore_bridge._core import kernels
from tiny import relative

DEVICE = os.environ.get("MCB_TEST_DEVICE", "cpu")
LARGEST = {False: 448.0, True: 57344.0}
FORMAT = {False: torch.float8_e4m3fn, True: torch.float8_e5m2}
SCALINGS = ["tensor", "rows", "blocks"]


def random(*shape, dtype=torch.bfloat16, seed=0, spread=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    if spread:  # magnitudes from 1e-4 to 1e4, so that scales matter
        x *= 10 ** (8 * torch.rand(*shape[:-1], 1, generator=generator) - 4)
    return x.to(DEVICE, dtype)


def quantize(x, scaling, e5m2=False, straight=True, turned=True, amax=None):
    reference = None
    if scaling == "tensor":
        reference = torch.zeros(1, device=x.device)
        kernels.fp8_raise_amax(x, reference)
    values, scale, values_t, scale_t = kernels.fp8_quantize(x, scaling, e5m2, straight, turned, reference, amax)
    return (values, scale), (values_t, scale_t)


def expected(x, scaling, e5m2):
    """(values, one scale per number) of x [rows, k], both padded, by the definition: scale = 1 / (largest / amax)."""
    multiple = 16 if scaling == "tensor" else 128
    x = torch.nn.functional.pad(x.float().cpu(), (0, 0, 0, -x.shape[0] % multiple))
    rows, k = x.shape
    if scaling == "tensor":
        amax = x.abs().amax().expand(rows, k)
    elif scaling == "rows":
        padded = torch.nn.functional.pad(x, (0, -k % 128))
        amax = padded.view(rows, -1, 128).abs().amax(-1).repeat_interleave(128, 1)[:, :k]
    else:
        amax = x.view(rows // 128, 128, k // 128, 128).abs().amax((1, 3)).repeat_interleave(128, 0).repeat_interleave(128, 1)
    factor = torch.where(amax > 0, torch.full_like(amax, LARGEST[e5m2]) / amax, 1.0)  # not number / tensor: torch multiplies
    factor = torch.where(factor.isfinite(), factor, 0.0)
    scale = torch.where(factor > 0, 1 / factor, 1.0)
    return (x * factor).clamp(-LARGEST[e5m2], LARGEST[e5m2]).to(FORMAT[e5m2]), scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("e5m2", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("rows,columns", [(16, 128), (200, 384), (1, 128), (384, 640)])
def test_quantisers_are_their_definition(rows, columns, scaling, e5m2, dtype):
    x = random(rows, columns, dtype=dtype).clamp(-3e4, 3e4)
    x[0, :3] = torch.tensor([0.0, 1e-30, -2.0])
    if rows > 128:
        x[128:] = 0  # whole blocks of zeros
    straight, turned = quantize(x, scaling, e5m2)
    for matrix, source in ((straight, x), (turned, x.t())):
        padded = source
        if matrix is turned:  # its columns are padded
            padded = torch.nn.functional.pad(source, (0, matrix[0].shape[1] - source.shape[1]))
            if scaling != "blocks":
                values, scale = expected(padded, scaling, e5m2)
                values, scale = values[: source.shape[0]], scale[: source.shape[0]]
            else:
                values, scale = expected(padded, scaling, e5m2)
        else:
            values, scale = expected(padded, scaling, e5m2)
        assert torch.equal(matrix[0].cpu().view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(kernels.fp8_dequantize(matrix, scaling).cpu(), values.float() * scale)


def test_edges_of_a_scale():
    """Infinity makes NaN and zeros, NaN stays alone, numbers too small for a scale become zeros."""
    for values, others in (([float("inf"), 1.0], 0.0), ([float("nan"), 1.0], 1.0), ([1e-42, 1e-43], None)):
        x = torch.zeros(16, 16, dtype=torch.float32, device=DEVICE)
        x[0, :2] = torch.tensor(values)
        back = kernels.fp8_dequantize(quantize(x, "tensor")[0], "tensor")
        if others is None:
            assert torch.equal(back, torch.zeros_like(back))
        else:
            assert back[0, 0].isnan() and back[0, 1].item() == others and back[1:].eq(0).all()


def test_amax_is_recorded_and_larger_numbers_are_clipped():
    x = random(48, 64, dtype=torch.float32, spread=False)
    amax = torch.full((1,), 0.5, device=DEVICE)
    small = torch.full((1,), 1.0, device=DEVICE)
    values, scale, _, _ = kernels.fp8_quantize(x, "tensor", False, True, False, small, amax)
    assert amax.item() == x.abs().max().item()
    assert scale.item() == pytest.approx(1 / 448)
    back = kernels.fp8_dequantize((values, scale), "tensor")
    assert back.abs().max().item() == pytest.approx(1.0) and relative(back.cpu(), x.clamp(-1, 1).cpu()) < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scaling_b", SCALINGS)
@pytest.mark.parametrize("rows", [256, 40])
def test_products_are_those_of_the_fp8_numbers(scaling_b, dtype, rows):
    scaling_a = "tensor" if scaling_b == "tensor" else "rows"
    (a, _), (b, _) = (quantize(random(n, 384, seed=n, spread=False), s) for n, s in ((rows, scaling_a), (128, scaling_b)))
    exact = kernels.fp8_dequantize(a, scaling_a).double() @ kernels.fp8_dequantize(b, scaling_b).double().t()
    exact = exact[:rows].cpu()
    like = torch.empty(0, dtype=dtype, device=DEVICE)
    # The tensor cores of Hopper sum with about 14 bits inside an instruction; then one rounding to the result's dtype.
    bound = 3e-3 if dtype == torch.bfloat16 else 3e-4 if DEVICE == "cuda" else 1e-5
    y = kernels.fp8_matmul(a, scaling_a, b, scaling_b, rows, None, like)
    assert y.shape == (rows, 128) and relative(y.cpu(), exact) < bound
    onto = random(rows, 128, dtype=dtype, seed=7, spread=False)
    total = exact + onto.double().cpu()
    y = kernels.fp8_matmul(a, scaling_a, b, scaling_b, rows, onto.clone(), like)
    assert relative(y.cpu(), total) < bound
    if rows == 256 and scaling_b != "blocks":
        total = torch.full((rows, 128), 2.0, device=DEVICE)
        kernels.fp8_accumulate(total, a, b, scaling_a, True)
        assert relative(total.cpu(), exact + 2) < (3e-4 if DEVICE == "cuda" else 1e-5)


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("rows", [128, 72])
def test_a_layer_is_its_formulas(recipe, hybrid, rows):
    """y = Q(x) Q(W)^T + s x A^T B^T and its gradients, Q being the numbers that FP8 stands for, in float64."""
    a_rows = "tensor" if recipe == "tensorwise" else "rows"
    x, weight = (
        random(rows // 2, 2, 256, dtype=torch.float32, seed=1),
        random(384, 256, dtype=torch.float32, seed=2, spread=False),
    )
    a, b = (random(*shape, dtype=torch.float32, seed=3, spread=False) for shape in ((4, 256), (384, 4)))
    grad = random(rows // 2, 2, 384, dtype=torch.float32, seed=5)
    given = [t.clone().requires_grad_(True) for t in (x, weight, a, b)]
    y = kernels.fp8_linear(*given, 2.0, recipe, hybrid)
    y.backward(grad)

    def rounded(matrix, scaling, e5m2, turned=False):
        straight, other = quantize(matrix, scaling, e5m2)
        return kernels.fp8_dequantize(other if turned else straight, scaling).double().cpu()

    x, grad = x.view(rows, 256), grad.view(rows, 384)
    w8 = rounded(weight, "tensor" if recipe == "tensorwise" else "blocks", False)
    g8, g8_turned = (rounded(grad, a_rows, hybrid, turned) for turned in (False, True))
    wide_x, wide_a, wide_b, wide_grad = (t.double().cpu() for t in (x, a, b, grad))
    low, grad_low = wide_x @ wide_a.t(), 2 * wide_grad @ wide_b
    expected = [
        rounded(x, a_rows, False)[:rows] @ w8.t() + 2 * low @ wide_b.t(),
        g8[:rows] @ w8 + grad_low @ wide_a,
        g8_turned @ rounded(x, a_rows, False, turned=True).t(),
        grad_low.t() @ wide_x,
        2 * wide_grad.t() @ low,
    ]
    bound = 3e-4 if DEVICE == "cuda" else 2e-6
    for found, exact in zip([y, *(t.grad for t in given)], expected):
        assert relative(found.detach().cpu().view(exact.shape), exact) < bound


BASE = dict(
    num_layers=3,
    hidden_size=256,
    ffn_hidden_size=384,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=64,
    padded_vocab_size=tiny.VOCAB,
    hf_model_type="llama",
    fp8="hybrid",
)
RECIPES = ["tensorwise", "delayed", "blockwise"]


def build(lora=False, **fields):
    config = mb.ModelConfig(**{**BASE, **fields})
    models = mb.get_mcore_model(config, device=DEVICE)
    config.bridge.initialize(models, seed=1)
    if lora:
        mb.add_lora(models, mb.LoraOptions(r=4))
        torch.manual_seed(0)
        with torch.no_grad():
            for name, p in models[0].named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape) * 0.005)  # an adapter of usual size
    return models


def batch(index=0, rows=2, length=48):
    ids, labels = tiny.rows(rows, length, seed=100 + index)
    return dict(input_ids=ids.to(DEVICE), labels=labels.to(DEVICE))


def gradients(models, **given):
    loss = models[0](**given).mean()
    loss.backward()
    return loss.item(), {name: p.grad.double().cpu() for name, p in models[0].named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fp8", ["hybrid", "e4m3"])
def test_model_is_near_its_own_dtype(recipe, fp8, lora):
    plain_loss, plain = gradients(build(lora, fp8=None), **batch())
    loss, found = gradients(build(lora, fp8=fp8, fp8_recipe=recipe), **batch())
    assert found.keys() == plain.keys()
    assert loss != plain_loss and abs(loss - plain_loss) < 3e-3
    # Rounding to 4 bits (e4m3) is an error of 0.026 (root mean square, relative), to 3 bits (e5m2) 0.052. The first layer's
    # gradients have passed 4 products a layer, each with a rounded gradient and a rounded weight; errors add up in squares.
    products, of_gradient = 4 * BASE["num_layers"], 0.052 if fp8 == "hybrid" else 0.026
    bound = 1.2 * (products * (of_gradient**2 + 0.026**2)) ** 0.5
    for name in plain:
        assert relative(found[name], plain[name]) < bound, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_recompute_and_repetition_change_nothing(recipe):
    """Micro-batches see the scales of one step: running layers again, or the batch again, gives the same bits."""
    first = gradients(build(fp8_recipe=recipe, params_dtype="bfloat16"), **batch())
    again = build(fp8_recipe=recipe, params_dtype="bfloat16", recompute_granularity="full")
    second = gradients(again, **batch())
    for name in first[1]:
        assert torch.equal(first[1][name], second[1][name]), name


def test_first_and_last_layers_stay():
    models = build(first_last_layers_bf16=True, fp8_recipe="delayed", fp8_amax_history_len=2)
    assert {name.split(".")[2] for name in _core.fp8_history([m.engine for m in models])} == {"1"}


def steps(trainer, first, count):
    return [trainer.train_step([batch(2 * i), batch(2 * i + 1)]).loss for i in range(first, first + count)]


def test_delayed_scales_follow_the_history(tmp_path):
    options = dict(lr=1e-3, lr_decay_style="constant", train_iters=10)
    models = build(fp8_recipe="delayed", fp8_amax_history_len=3)
    engines = [m.engine for m in models]
    name = "decoder.layers.0.mlp.linear_fc2"
    weight = dict(models[0].named_parameters())[name + ".weight"]
    trainer = mb.Trainer(models, **options)
    seen = []
    for step in range(4):
        seen.append(weight.detach().abs().max().item())
        steps(trainer, step, 1)
        history = _core.fp8_history(engines)[name]
        assert history.shape == (3, 3)
        assert history[1].tolist() == (seen[::-1] + [0, 0])[:3]
        assert history[0, 0] > 0 and history[2, 0] > 0
    # A run that goes on from here: the same weights and history give the same losses, another history does not.
    state = {k: v.clone() for k, v in models[0].state_dict().items()}
    saved = {k: v.clone() for k, v in _core.fp8_history(engines).items()}
    evaluated = trainer.evaluate([batch(99)])
    other = build(fp8_recipe="delayed", fp8_amax_history_len=3)
    other[0].load_state_dict(state)
    _core.set_fp8_history([m.engine for m in other], saved)
    assert mb.Trainer(other, **options).evaluate([batch(99)]) == evaluated
    assert all(torch.equal(v, saved[k]) for k, v in _core.fp8_history(engines).items())  # evaluation records nothing
    _core.set_fp8_history([m.engine for m in other], {k: 8 * v for k, v in saved.items()})
    assert mb.Trainer(other, **options).evaluate([batch(99)]) != evaluated


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_follows_the_plain_run(recipe, lora):
    # At ten times the learning rate this model is chaotic: bf16 leaves fp32 as FP8 does.
    losses = {}
    for fp8 in (None, "hybrid"):
        trainer = mb.Trainer(build(lora, fp8=fp8, fp8_recipe=recipe), lr=3e-4, lr_decay_style="constant", train_iters=100)
        losses[fp8] = [trainer.train_step([batch(0), batch(1)]).loss for _ in range(8)]
    gained = losses[None][0] - losses[None][-1]
    assert gained > 0.1
    assert max(abs(a - b) for a, b in zip(losses[None], losses["hybrid"])) < 0.015 * gained + 5e-3


def test_frozen_weights_are_quantised_once_and_stay():
    models = build(lora=True, fp8_recipe="tensorwise")
    before = {n: p.detach().clone() for n, p in models[0].named_parameters() if not p.requires_grad}
    trainer = mb.Trainer(models, lr=1e-3, lr_decay_style="constant", train_iters=10)
    steps(trainer, 0, 2)
    assert all(torch.equal(p, before[n]) for n, p in models[0].named_parameters() if n in before)
    # A weight that changes is seen, by whatever wrote it.
    loss = trainer.evaluate([batch(5)])
    with torch.no_grad():
        dict(models[0].named_parameters())["decoder.layers.0.mlp.linear_fc2.base_layer.weight"].mul_(2)
    assert trainer.evaluate([batch(5)]) != loss


@pytest.mark.parametrize(
    "fields,words",
    [
        (dict(fp8="e5m2"), ["fp8", "e5m2", "e4m3, hybrid"]),
        (dict(fp8_recipe="mxfp8"), ["mxfp8", "tensorwise"]),
        (dict(fp8_recipe="rowwise"), ["fp8_recipe", "rowwise", "tensorwise, delayed, blockwise"]),
        (dict(fp8_amax_history_len=0), ["fp8_amax_history_len", "0"]),
        (dict(fp8_amax_compute_algo="mean"), ["fp8_amax_compute_algo", "mean"]),
        (dict(ffn_hidden_size=200), ["linear_fc2", "200 columns", "multiple of 16"]),
        (dict(ffn_hidden_size=160, fp8_recipe="blockwise"), ["multiple of 128", "tensorwise"]),
    ],
)
def test_refusals(fields, words):
    with pytest.raises(ValueError) as error:
        build(**fields)
    for word in words:
        assert word in str(error.value)


def test_published_codes_come_back():
    """A blockwise checkpoint's weight is loaded as bf16: quantising that again gives its very codes."""
    weight = random(256, 384, seed=3)
    (codes, scale), _ = quantize(weight, "blocks")
    loaded = kernels.fp8_dequantize((codes, scale), "blocks").bfloat16()
    (again, scale_again), _ = quantize(loaded, "blocks")
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
    assert relative(scale_again[:, :3].cpu(), scale[:, :3].cpu()) < 2**-8
