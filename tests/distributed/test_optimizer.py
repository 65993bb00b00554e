"""Every way to share the optimizer, gradients and parameters out trains as one rank does, and saves the memory it should."""

import pytest
import tiny
import torch
from launch import run_cases
from same_training import same_training
from test_layouts import STEPS

SMALL = 6000  # elements: many buckets, cut in the middle of parameters
OVERLAP = dict(overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=SMALL)
LORA = dict(lora=dict(r=4, lora_alpha=8))

# What is trained, on one rank.
REFERENCES = {
    "adam": dict(),
    "unclipped": dict(options=dict(clip_grad=0.0)),
    "lora": LORA,
    "recompute": dict(fields=dict(recompute_granularity="full", recompute_num_layers=2)),
    "lora_recompute": dict(**LORA, fields=dict(recompute_granularity="full", recompute_num_layers=2)),
    "packed": dict(packed=True),
    "sgd": dict(options=dict(optimizer="sgd", lr=5e-2, clip_grad=0.5)),
    "muon": dict(options=dict(optimizer="muon", muon_fp32_matmul_prec="highest", lr_mult={"linear_qkv": 0.5})),
    "schedule": dict(
        options=dict(weight_decay_incr_style="cosine", start_weight_decay=0.0, end_weight_decay=0.3, lr_mult={"embedding": 0.3})
    ),
}
# How: options of the trainer.
MODES = {
    "plain": dict(use_distributed_optimizer=False),
    "plain_overlap": dict(use_distributed_optimizer=False, overlap_grad_reduce=True, ddp_bucket_size=SMALL),
    "sharded": dict(ddp_bucket_size=SMALL),
    "overlap": OVERLAP,
    "overlap_again": OVERLAP,
    "offload": dict(optimizer_cpu_offload=True, optimizer_offload_fraction=0.6),
    "zero2": dict(data_parallel_sharding_strategy="optim_grads"),
    "zero3": dict(data_parallel_sharding_strategy="optim_grads_params"),
    "distributed": dict(muon_tp_mode="distributed", **OVERLAP),
    "duplicated": dict(muon_tp_mode="duplicated"),
}
LAYOUTS = {
    "dp2": (2, dict()),
    "dp4": (4, dict()),
    "tp2_dp2": (4, dict(tp=2, sp=True)),
    "pp2_dp2": (4, dict(pp=2)),
    "vpp2_dp2": (4, dict(pp=2, vpp=2)),
    "zb_dp2": (4, dict(pp=2, fields=dict(pipeline_schedule="zb-h1"))),
    "cp2_dp2": (4, dict(cp=2)),
    "tp4": (4, dict(tp=4)),
}
FAST = [
    *[
        ("adam", mode, "dp2")
        for mode in ("plain", "plain_overlap", "sharded", "overlap", "overlap_again", "offload", "zero2", "zero3")
    ],
    *[("adam", mode, "tp2_dp2") for mode in ("overlap", "zero3")],
    *[("adam", mode, "pp2_dp2") for mode in ("overlap", "zero3")],
    # The first half of a split backward tells of gradients that come with the second.
    *[("adam", mode, "zb_dp2") for mode in ("overlap", "zero2", "zero3")],
    *[("unclipped", mode, "dp2") for mode in ("plain", "overlap")],
    ("lora", "zero3", "dp2"),
    ("lora_recompute", "zero3", "pp2_dp2"),
    ("recompute", "zero3", "tp2_dp2"),
    ("recompute", "zero3", "pp2_dp2"),  # the embedding is not gathered for a layer that runs again, and grows no older
    ("sgd", "overlap", "dp2"),
    ("muon", "sharded", "dp2"),
    ("muon", "distributed", "tp2_dp2"),
    ("muon", "duplicated", "tp4"),
    ("schedule", "zero3", "dp2"),
]
MUON_MODES = ("distributed", "duplicated")
ALL = [
    (what, mode, layout)
    for what in REFERENCES
    for mode in MODES
    for layout in LAYOUTS
    if mode != "overlap_again"
    and (what == "muon" or mode not in MUON_MODES)
    and not (
        what == "muon" and (mode in ("offload", "zero2", "zero3") or (layout in ("tp2_dp2", "tp4") and mode not in MUON_MODES))
    )
]


def merged(what, mode=None, layout=None):
    """The case of one rank, or of a mode and layout."""
    options = {**REFERENCES[what].get("options", {}), **MODES.get(mode, {})}
    split = dict(name=f"{what}-{mode}-{layout}", layout=LAYOUTS[layout][1]) if layout else dict(name=what)
    return {**REFERENCES[what], **split, "options": options}


def results_of(cases, folder, work, steps=STEPS):
    names = sorted({what for what, _, _ in cases})
    found = run_cases(folder, [dict(steps=steps, **merged(what)) for what in names], 1, work)
    for processes in (2, 4):
        jobs = [
            dict(steps=steps, **merged(what, mode, layout)) for what, mode, layout in cases if LAYOUTS[layout][0] == processes
        ]
        found.update(run_cases(folder, jobs, processes, work))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("optimizer") / "model"
    tiny.save("qwen3_tied", path, num_key_value_heads=2, num_hidden_layers=4)
    return path


@pytest.fixture(scope="module")
def fast(folder, tmp_path_factory):
    return results_of(FAST, folder, tmp_path_factory.mktemp("fast"), steps=12)


def check(found, what, mode, layout):
    case = merged(what, mode, layout)
    same_training(found[what], found[case["name"]], case, LAYOUTS[layout][0], "qwen3_tied")


@pytest.mark.parametrize("what,mode,layout", FAST)
def test_same_as_one_rank(fast, what, mode, layout):
    check(fast, what, mode, layout)


def test_sharing_does_not_change_a_bit(fast):
    """The same run again; and two ranks add two numbers: shared out or not, the same sum. (Clipping sees a norm that is added up
    in another order.)"""
    for one, other in (
        ("adam-overlap-dp2", "adam-overlap_again-dp2"),
        ("adam-plain-dp2", "adam-plain_overlap-dp2"),
        ("unclipped-plain-dp2", "unclipped-overlap-dp2"),
    ):
        assert fast[one]["losses"] == fast[other]["losses"], other
        for key, tensor in fast[one]["weights"].items():
            assert torch.equal(fast[other]["weights"][key], tensor), (other, key)


def test_memory_shrinks(fast):
    one = fast["adam"]["memory"]
    parameters, states = one["parameters"], one["optimizer"]
    assert states == 2 * parameters == 2 * one["gradients"]  # fp32: two moments, no master copies

    def near(value, expected):
        return expected <= value * 1.001 and value <= expected * 1.15 + 20_000  # padding of shards and buckets

    plain, sharded = fast["adam-plain-dp2"]["memory"], fast["adam-sharded-dp2"]["memory"]
    assert near(plain["optimizer"], states) and near(sharded["optimizer"], states / 2)
    assert near(sharded["gradients"], one["gradients"])
    zero2, zero3 = fast["adam-zero2-dp2"]["memory"], fast["adam-zero3-dp2"]["memory"]
    assert near(zero2["gradients"], one["gradients"] / 2) and near(zero2["parameters"], parameters)
    assert near(zero3["gradients"], one["gradients"] / 2) and near(zero3["parameters"], parameters / 2)
    offload = fast["adam-offload-dp2"]["memory"]
    # The copy in host memory has masters as well: three numbers for each of the 60 %.
    assert near(offload["optimizer_host"], 0.6 * states / 2 * 1.5) and near(offload["optimizer"], 0.4 * states / 2)
    lora = fast["lora-zero3-dp2"]["memory"]
    assert near(lora["parameters"], parameters / 2 + lora["gradients"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_combination(folder, tmp_path, layout):
    cases = [case for case in ALL if case[2] == layout]
    found = results_of(cases, folder, tmp_path)
    for what, mode, _ in cases:
        check(found, what, mode, layout)


def test_low_precision_states(folder, tmp_path):
    """bf16 parameters with bf16 moments and without masters still learn; float16 skips until its scale fits."""
    common = dict(steps=8, layout={}, fields=dict(params_dtype="bfloat16"))
    cases = [
        dict(name="masters", **common),
        dict(name="moments", **common, options=dict(exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16", main_grads_dtype="bf16")),
        dict(name="remainders", **common, options=dict(store_param_remainders=True)),
        dict(name="bare", **common, options=dict(main_params_dtype="bf16", data_parallel_sharding_strategy="optim_grads_params")),
        dict(
            name="half",
            steps=16,
            layout={},
            fields=dict(params_dtype="float16"),
            options=dict(initial_loss_scale=2.0**24, hysteresis=1),
        ),
    ]
    found = run_cases(folder, cases, 2, tmp_path)
    masters = found["masters"]
    assert masters["losses"][-1] < masters["losses"][0]
    for name in ("moments", "bare", "half"):
        losses = found[name]["losses"]
        assert losses[-1] < losses[0], name
        assert abs(losses[0] - masters["losses"][0]) < 0.05
    # The same masters in half the bytes: of 4 + 8 a number, 2 + 8.
    assert found["remainders"]["losses"] == pytest.approx(masters["losses"], rel=1e-4)
    assert found["remainders"]["losses"][:2] == masters["losses"][:2]
    assert found["remainders"]["memory"]["optimizer"] * 12 == masters["memory"]["optimizer"] * 10
    assert masters["memory"]["optimizer"] > 1.9 * found["bare"]["memory"]["optimizer"] * 0.75
    assert found["moments"]["memory"]["gradients"] * 2 == masters["memory"]["gradients"]
