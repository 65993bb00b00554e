"""Three and four dimensions at once, on eight ranks, train as one rank does."""

import pytest
import tiny
from launch import run_cases
from same_training import same_training
from test_layouts import MODELS, STEPS

ZERO3 = dict(data_parallel_sharding_strategy="optim_grads_params")
ZERO_BUBBLE = dict(fields=dict(pipeline_schedule="zb-h1"))


def layout(options=None, **sizes):
    return dict(layout=sizes, options=options or {})


LAYOUTS = {
    "tp8_two_kv_heads": layout(tp=8, sp=True),
    "tp2_pp2_dp2": layout(tp=2, pp=2, sp=True),
    "tp2_pp2_vpp3_dp2": layout(tp=2, pp=2, vpp=3, sp=True),
    "tp2_pp2_dp2_zb": layout(tp=2, pp=2, sp=True, **ZERO_BUBBLE),
    "tp4_pp2": layout(tp=4, pp=2, sp=True),
    "pp4_dp2_zero3": layout(ZERO3, pp=4, fields=dict(num_layers_in_first_pipeline_stage=3)),
    "tp2_cp2_dp2": layout(tp=2, cp=2, sp=True),
    "tp2_cp2_dp2_zero3": layout(ZERO3, tp=2, cp=2, sp=True),
    "tp2_cp2_pp2": layout(tp=2, cp=2, pp=2, sp=True),
    "cp2_pp2_vpp3_dp2": layout(cp=2, pp=2, vpp=3),
    "cp2_pp2_dp2_zb_gather": layout(
        cp=2, pp=2, fields=dict(cp_comm_type="all_gather", pipeline_schedule="zb-h1")
    ),
    "cp4_dp2_overlap": layout(dict(overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=6000), cp=4),
}  # fmt: skip
VARIANTS = {
    "full": dict(),
    "full_packed": dict(packed="padded"),
    "lora": dict(lora=dict(r=4, lora_alpha=8)),
    "lora_packed": dict(packed="padded", lora=dict(r=4, lora_alpha=8)),
}
CASES = {
    (variant, name): dict(name=f"{variant}-{name}", steps=STEPS, **split, **settings)
    for variant, settings in VARIANTS.items()
    for name, split in LAYOUTS.items()
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    work = tmp_path_factory.mktemp("eight")
    family, overrides = MODELS["qwen3"]
    tiny.save(family, work / "model", **overrides)
    found = run_cases(work / "model", [dict(name=name, steps=STEPS, **settings) for name, settings in VARIANTS.items()], 1, work)
    found.update(run_cases(work / "model", list(CASES.values()), 8, work))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_as_one_rank(results, variant, name):
    same_training(results[variant], results[f"{variant}-{name}"], CASES[variant, name], 8, "qwen3")
