"""Routers in float32 beside bfloat16 weights train the same on every layout, and go on from a checkpoint bit for bit."""

import chat_model
import pytest
import tiny
import torch
from launch import run_cases
from test_resume import argv, jobs, same_bits, state

# Every token to three experts, and SGD: nothing that rounding in bfloat16 turns into a jump.
CASE = dict(
    steps=4,
    crowded=3,
    fields=dict(params_dtype="bfloat16"),
    options=dict(optimizer="sgd", lr=1.0, weight_decay=0.0, clip_grad=0.0, lr_decay_style="constant", lr_warmup_iters=0),
)
LAYOUTS = {
    "ep2": (2, dict(ep=2)),
    "tp2_sp": (2, dict(tp=2, sp=True, etp=1)),
    "pp2": (2, dict(pp=2)),
    "ep2_sharded": (2, dict(ep=2)),
    "ep2_etp2_tp2_sp": (4, dict(ep=2, etp=2, tp=2, sp=True)),
    "ep2_cp2": (4, dict(ep=2, cp=2)),
}
SHARDED = dict(data_parallel_sharding_strategy="optim_grads_params")


def is_gate(name):
    return name.endswith("mlp.gate.weight")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    work = tmp_path_factory.mktemp("router")
    tiny.save("glm4_moe", work / "model", num_hidden_layers=4)
    found = run_cases(work / "model", [dict(CASE, name="one", save=str(work / "one"))], 1, work)
    for processes in (2, 4):
        cases = []
        for name, (count, layout) in LAYOUTS.items():
            if count != processes:
                continue
            options = {**CASE["options"], **(SHARDED if name.endswith("sharded") else {})}
            cases.append(dict(CASE, name=name, layout=layout, options=options, save=str(work / name)))
            cases.append(dict(CASE, name=f"untouched-{name}", steps=0, layout=layout, save=str(work / f"untouched-{name}")))
        found |= run_cases(work / "model", cases, processes, work)
    return found, work


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_as_one_rank(results, layout):
    found, work = results
    base, expected, actual = tiny.stored(work / "model"), found["one"], found[layout]
    assert actual["alike"] and expected["losses"][-1] < expected["losses"][0] - 0.05
    assert actual["losses"] == pytest.approx(expected["losses"], rel=5e-3)
    gates = [name for name in base if is_gate(name)]
    assert len(gates) == 3
    for name in gates:
        assert actual["weights"][name].dtype == torch.float32
        moved = expected["weights"][name] - base[name]
        assert moved.norm() > 1e-4 * base[name].norm()
        assert tiny.relative(actual["weights"][name] - base[name], moved) < 5e-2, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files(results, layout):
    found, work = results
    base = tiny.stored(work / "model")
    for copy in (tiny.stored(work / f"untouched-{layout}"), found[f"untouched-{layout}"]["weights"]):
        assert copy.keys() == base.keys()
        for name, tensor in base.items():
            wide = is_gate(name) or name.endswith("e_score_correction_bias")
            assert torch.equal(copy[name], tensor if wide else tensor.bfloat16()), name
            assert copy[name].dtype == (torch.float32 if wide else torch.bfloat16)
    saved = tiny.stored(work / layout)
    assert all(torch.equal(saved[name], tensor) for name, tensor in found[layout]["weights"].items())


def test_resume(tmp_path):
    """A router is its own master; everything else has one."""
    work = chat_model.make(tmp_path, "glm4_moe", num_hidden_layers=2, attention_bias=False)
    layout = ["--expert_model_parallel_size", 2, "--tensor_model_parallel_size", 2, "--sequence_parallel", "true"]
    parts = argv(work, "parts", *layout, "--resume_from_checkpoint", "auto", dtype="bfloat16")
    found = jobs(
        work, "router", 2,
        dict(name="whole", argv=argv(work, "whole", *layout, dtype="bfloat16")),
        dict(name="first", argv=parts, stop_after=3),
        dict(name="second", argv=parts),
    )  # fmt: skip
    assert found["second"]["start"] == 3
    assert found["first"]["steps"] + found["second"]["steps"] == found["whole"]["steps"]
    whole, resumed = work / "whole/checkpoint-6", work / "parts/checkpoint-6"
    same_bits(tiny.stored(whole), tiny.stored(resumed))
    same_bits(state(whole), state(resumed))
    weights = tiny.stored(whole)
    trained = {key.split("/")[1] for key in state(whole) if key.startswith("exp_avg/")}
    masters = {key.split("/")[1] for key in state(whole) if key.startswith("master/")}
    assert masters and trained - masters == {name for name in weights if is_gate(name)}
    assert all(weights[name].dtype == torch.float32 for name in trained - masters)
    # Gone on with on one rank.
    command = argv(work, "one", "--resume_from_checkpoint", work / "parts/checkpoint-3", dtype="bfloat16")
    alone = jobs(work, "one", 1, dict(name="one", argv=command))["one"]
    assert alone["start"] == 3
    for step, expected in zip(alone["steps"], found["whole"]["steps"][3:], strict=True):
        assert step[0] == pytest.approx(expected[0], rel=1e-2)
