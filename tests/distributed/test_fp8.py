"""FP8 over several ranks: a tensor that is split has the scale of the whole one, so every layout trains like one rank."""

import pytest
import tiny
import torch
from launch import run_cases

STEPS = 3
LAYOUTS = {
    "tp2": (2, dict(tp=2)),
    "tp2_sp": (2, dict(tp=2, sp=True)),
    "pp2": (2, dict(pp=2)),
    "dp2": (2, dict()),
    "dp2_sharded": (2, dict()),
}
LORA_LAYOUTS = ["tp2", "tp2_sp"]
RECIPES = {
    "delayed": dict(fp8="hybrid", fp8_recipe="delayed", fp8_amax_history_len=4),
    "tensorwise": dict(fp8="hybrid", fp8_recipe="tensorwise"),
    "blockwise": dict(fp8="e4m3", fp8_recipe="blockwise"),
}
# Blocks of 128 on two tensor ranks.
SHAPE = dict(
    hidden_size=256, intermediate_size=256, head_dim=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
)


def case(name, recipe, layout=(), **more):
    options = dict(lr=1e-4, lr_decay_style="constant", lr_warmup_iters=0)
    if name.endswith("sharded"):
        options |= dict(data_parallel_sharding_strategy="optim_grads_params")
    return dict(name=name, layout=dict(layout), steps=STEPS, micro_batches=2, fields=RECIPES[recipe], options=options, **more)


def param_case(name, recipe, layout=()):
    """LoRA in bf16, over weights kept as FP8 codes (fp8_param) or not."""
    made = case(name, recipe, layout, lora=dict(r=4))
    made["fields"] = {**made["fields"], "params_dtype": "bfloat16", "fp8_param": name.startswith("param")}
    return made


TRAINED = {  # layout, further fields, Trainer options
    "dp2": ({}, {}, {}),
    "dp2_overlap": ({}, {}, dict(overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=200_000)),
    "dp2_no_shard": ({}, {}, dict(data_parallel_sharding_strategy="no_shard")),
    "dp2_muon": ({}, {}, dict(optimizer="muon")),
    "dp2_offload": ({}, {}, dict(optimizer_cpu_offload=True, optimizer_offload_fraction=0.61)),
    "tp2": (dict(tp=2), {}, {}),
    "tp2_sp": (dict(tp=2, sp=True), {}, {}),
    "pp2": (dict(pp=2), {}, {}),
    "pp2_zb": (dict(pp=2), dict(pipeline_schedule="zb-h1"), {}),
    "cp2": (dict(cp=2), {}, {}),
}


def trained_case(recipe, layout, param):
    """Training in full, in bf16: over weights kept as FP8 codes or not."""
    parts, fields, options = TRAINED[layout]
    made = case(f"trained-{'param' if param else 'wide'}-{recipe}-{layout}", recipe, parts)
    fields = {**made["fields"], **fields, "params_dtype": "bfloat16", "fp8_param": param}
    return {**made, "fields": fields, "options": {**made["options"], "lr": 1e-3, "clip_grad": 0.0, **options}, "steps": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    work = tmp_path_factory.mktemp("fp8_trained")
    tiny.save("qwen3_tied", work / "model", **SHAPE)
    todo = [
        trained_case(recipe, layout, param)
        for recipe in ("tensorwise", "blockwise")
        for layout in TRAINED
        for param in (False, True)
    ]
    return run_cases(work / "model", todo, 2, work)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("layout", TRAINED)
def test_trained_codes_alone_are_trained_wide_weights(trained, recipe, layout):
    """Scales from shards on every rank, codes gathered as bytes: bit for bit the run that quantises whole bf16 weights."""
    wide, param = (trained[f"trained-{kind}-{recipe}-{layout}"] for kind in ("wide", "param"))
    assert param["losses"] == wide["losses"] and param["losses"][-1] < param["losses"][0]
    assert param["norms"] == pytest.approx(wide["norms"], rel=1e-6)  # shards of buckets of one dtype are other pieces of the sum
    assert param["evaluated"] == wide["evaluated"] and param["alike"] and torch.equal(param["logits"], wide["logits"])
    assert all(torch.equal(param["weights"][name], wide["weights"][name]) for name in wide["weights"])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    work = tmp_path_factory.mktemp("fp8")
    tiny.save("qwen3_tied", work / "model", **SHAPE)
    lora = dict(lora=dict(r=4))
    single = [case(recipe, recipe) for recipe in RECIPES] + [case("lora", "delayed", **lora)]
    single += [param_case(f"param-{recipe}", recipe) for recipe in RECIPES]
    found = run_cases(work / "model", single, 1, work)
    several = [case(f"{recipe}-{name}", recipe, layout) for recipe in RECIPES for name, (_, layout) in LAYOUTS.items()]
    several += [case(f"lora-{name}", "delayed", LAYOUTS[name][1], **lora) for name in LORA_LAYOUTS]
    for recipe in RECIPES:
        several += [param_case(f"{kind}-{recipe}-tp2", recipe, LAYOUTS["tp2"][1]) for kind in ("wide", "param")]
    several += [param_case(f"{kind}-tensorwise-tp2_sp", "tensorwise", LAYOUTS["tp2_sp"][1]) for kind in ("wide", "param")]
    found.update(run_cases(work / "model", several, 2, work))
    return found


@pytest.mark.parametrize(
    "recipe, layout",
    [(recipe, layout) for recipe in RECIPES for layout in LAYOUTS] + [("lora", layout) for layout in LORA_LAYOUTS],
)
def test_same_as_one_rank(results, recipe, layout):
    one, several = results[recipe], results[f"{recipe}-{layout}"]
    # Sums in another order now and then move a number over the edge between two FP8 numbers, and what follows is other rounding
    # noise of the same size: not the 1e-5 of fp32. test_magnitudes is the sharp one.
    for ours, theirs in zip(several["losses"], one["losses"], strict=True):
        assert abs(ours - theirs) < 1e-2, (several["losses"], one["losses"])
    assert several["alike"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_magnitudes_are_those_of_whole_tensors(results, layout):
    one, several = results["delayed"]["amax"], results[f"delayed-{layout}"]["amax"]
    assert several.keys() <= one.keys() and len(several) == (len(one) // 2 if layout == "pp2" else len(one))
    first = []  # of the first step: activations and gradients of every layer
    for name, values in several.items():
        assert values.shape == (3, 4) and values[:, 3].eq(0).all()
        assert values[1, 2] == one[name][1, 2], name  # the same weights exactly
        first += [abs(values[slot, 2] / one[name][slot, 2] - 1).item() for slot in (0, 2)]
    # Most are the same up to the order of sums; with the scale of a part instead of the whole they differ by hundredths.
    assert sorted(first)[len(first) // 2] < 1e-5


@pytest.mark.parametrize("case", [f"{recipe}-tp2" for recipe in RECIPES] + ["tensorwise-tp2_sp"])
def test_codes_alone_train_like_wide_weights(results, case):
    """fp8_param changes no number, and what is exported is what one rank exports: scales are those of whole tensors."""
    wide, param = results[f"wide-{case}"], results[f"param-{case}"]
    assert param["losses"] == wide["losses"] and param["evaluated"] == wide["evaluated"] and param["alike"]
    assert all(torch.equal(param["adapter"][name], wide["adapter"][name]) for name in wide["adapter"])
    assert torch.equal(param["logits"], wide["logits"])
    one = results[f"param-{case.split('-')[0]}"]["weights"]
    assert one.keys() == param["weights"].keys()
    assert all(torch.equal(param["weights"][name], one[name]) for name in one)
    assert any(not torch.equal(param["weights"][name], wide["weights"][name]) for name in one)
