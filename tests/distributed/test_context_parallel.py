"""Context parallelism trains as one rank does: every transport, with windows, packed documents and the other dimensions."""

import pytest
import tiny
import torch
from launch import run_cases
from same_training import same_training

STEPS = 20

# (name, processes, layout)
LAYOUTS = {
    "ring": (2, dict(cp=2)),
    "gather": (2, dict(cp=2, fields=dict(cp_comm_type="all_gather"))),
    "a2a": (2, dict(cp=2, fields=dict(cp_comm_type="a2a"))),
    "ring4": (4, dict(cp=4)),
    "gather4": (4, dict(cp=4, fields=dict(cp_comm_type="all_gather"))),
    "a2a4": (4, dict(cp=4, fields=dict(cp_comm_type="a2a"))),
    "ring_tp2_sp": (4, dict(cp=2, tp=2, sp=True)),
    "gather_tp2_sp": (4, dict(cp=2, tp=2, sp=True, fields=dict(cp_comm_type="all_gather"))),
    "a2a_tp2": (4, dict(cp=2, tp=2, fields=dict(cp_comm_type="a2a"))),
    "ring_pp2": (4, dict(cp=2, pp=2)),
    "a2a_pp2": (4, dict(cp=2, pp=2, fields=dict(cp_comm_type="a2a"))),
    "ring_pp2_vpp2": (4, dict(cp=2, pp=2, vpp=2)),
    "ring_pp2_zb": (4, dict(cp=2, pp=2, fields=dict(pipeline_schedule="zb-h1"))),
    "a2a_pp2_zb": (4, dict(cp=2, pp=2, fields=dict(cp_comm_type="a2a", pipeline_schedule="zb-h1"))),
    "ring_dp2": (4, dict(cp=2)),
    "gather_dp2": (4, dict(cp=2, fields=dict(cp_comm_type="all_gather"))),
}
MODELS = {
    # Tied embeddings, biases, QK norms, grouped key/value heads.
    "qwen3": ("qwen3_tied", dict()),
    # A window on every layer that crosses the borders of chunks.
    "mistral": ("mistral_window", dict()),
    # Half of the layers have the window; yarn.
    "qwen2": ("qwen2_yarn_window", dict()),
    "llama": ("llama3_biases_tied", dict(tie_word_embeddings=False)),
}
VARIANTS = {
    "padded": dict(packed="padded"),
    "rows": dict(),
    "lora": dict(packed="padded", lora=dict(r=4, lora_alpha=8)),
    "recompute": dict(packed="padded", fields=dict(recompute_granularity="full")),
    "unequal": dict(packed="unequal"),
    "mean_of_means": dict(options=dict(calculate_per_token_loss=False, clip_grad=0.1)),
}
EVERY_LAYOUT = list(LAYOUTS)
# (model, variant, layouts): what `make test` runs, and what `make test-all` adds.
FAST = [
    ("qwen3", "padded", ["ring", "gather", "a2a", "ring_tp2_sp", "ring_pp2"]),
    ("qwen3", "unequal", ["gather", "ring_dp2"]),
    ("mistral", "padded", ["ring", "gather", "a2a", "ring4"]),
]
SLOW = [(model, variant, EVERY_LAYOUT) for model in MODELS for variant in VARIANTS]


def case_of(variant, layout):
    return dict(name=f"{variant}-{layout}", layout=LAYOUTS[layout][1], steps=STEPS, **VARIANTS[variant])


def results_of(plan, folder):
    found = {}
    for model in {model for model, _, _ in plan}:
        work = folder / model
        work.mkdir()
        family, overrides = MODELS[model]
        tiny.save(family, work / "model", **overrides)
        cases = {1: {}, 2: {}, 4: {}}
        for _, variant, layouts in (entry for entry in plan if entry[0] == model):
            cases[1][variant] = dict(name=variant, steps=STEPS, **VARIANTS[variant])
            for name in layouts:
                cases[LAYOUTS[name][0]][f"{variant}-{name}"] = case_of(variant, name)
        for processes, some in cases.items():
            if some:
                results = run_cases(work / "model", list(some.values()), processes, work)
                found.update({f"{model}-{name}": result for name, result in results.items()})
    return found


def check(found, plan):
    for model, variant, layouts in plan:
        for layout in layouts:
            case = case_of(variant, layout)
            actual = found[f"{model}-{case['name']}"]
            same_training(found[f"{model}-{variant}"], actual, case, LAYOUTS[layout][0], model)


def row_lengths(steps=STEPS, total=4):
    """Tokens of every "padded" row that a run trains on."""
    from worker import micro_batch

    return [
        micro_batch((step * total + index) % (2 * total), "padded")["input_ids"].shape[1]
        for step in range(steps)
        for index in range(total)
    ]


def check_volume(found):
    """Bytes per transport as docs/parallelism.md gives them: 4 layers, 4 key/value heads, 8 heads of 12, fp32."""
    part, width = sum(row_lengths()) // 2, 12 * 4  # tokens of one of two ranks; bytes of a head
    ring = found["qwen3-padded-ring"]["volume"]["cp"]
    assert ring["send"]["bytes"] == 4 * part * 4 * width * (2 * 1 + 2 * 1 + 2 * 2)
    gather = found["qwen3-padded-gather"]["volume"]["cp"]
    assert gather["all_gather"]["bytes"] == 4 * 2 * (2 * part) * 2 * 4 * width
    assert gather["reduce_scatter"]["bytes"] == 4 * (2 * part) * 2 * 4 * width
    heads = found["qwen3-padded-a2a"]["volume"]["cp"]
    assert heads["all_to_all"]["bytes"] == 4 * 2 * part * (8 + 2 * 4 + 8) * width


def test_same_as_one_rank(tmp_path):
    found = results_of(FAST, tmp_path)
    check(found, FAST)
    check_volume(found)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_is_the_same_as_one_rank(model, tmp_path):
    plan = [entry for entry in SLOW if entry[0] == model]
    check(results_of(plan, tmp_path), plan)


def test_split_inputs_by_hand(tmp_path):
    """model(...) takes this rank's part, as Megatron's models do: losses and gradients are those of the whole."""
    tiny.save("mistral_window", tmp_path / "model")
    direct = dict(packed="padded", steps=0, direct=True)
    (alone,) = run_cases(tmp_path / "model", [dict(name="a", **direct)], 1, tmp_path).values()
    split = run_cases(
        tmp_path / "model", [dict(name=n, layout=LAYOUTS[n][1], **direct) for n in ("ring", "gather", "a2a")], 2, tmp_path
    )
    for name, found in split.items():
        assert torch.allclose(found["direct"]["loss"], alone["direct"]["loss"], atol=1e-5), name
        for key, gradient in alone["direct"]["gradients"].items():
            assert tiny.relative(found["direct"]["gradients"][key], gradient) < 1e-4, (name, key)
