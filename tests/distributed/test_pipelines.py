"""Every pipeline schedule and layout trains as one rank does; activations are freed; a lost stage ends the others."""

import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import tiny
import torch
from launch import HERE, environment, run_cases
from same_training import close, same_training
from test_layouts import MODELS, STEPS, VARIANTS

ODD = {"odd": dict(micro_batches=5), "odd_lora_packed": dict(micro_batches=7, packed=True, lora=dict(r=4, lora_alpha=8))}
ALL = {**VARIANTS, **ODD, "single": dict(micro_batches=1)}


def fields(**values):
    return dict(fields=values)


# (name, processes, layout, the variants that `make test` runs); the model has 6 layers.
PIPELINES = [
    ("pp2_vpp3", 2, dict(pp=2, vpp=3), ["full", "odd_lora_packed"]),
    ("pp2_layout", 2, dict(pp=2, **fields(pipeline_model_parallel_layout="Et*4|ttL")), ["lora"]),
    ("pp2_empty_chunk", 2, dict(pp=2, **fields(pipeline_model_parallel_layout="Et||t*5|L")), ["full_packed", "odd"]),
    (
        "pp2_vpp2_uneven",
        2,
        dict(pp=2, vpp=2, **fields(num_layers_in_first_pipeline_stage=2, num_layers_in_last_pipeline_stage=4)),
        ["lora_parts_packed"],
    ),
    ("pp2_zb", 2, dict(pp=2, **fields(pipeline_schedule="zb-h1")), ["full", "lora_parts_packed", "odd", "recompute"]),
    ("pp4_vpp2_ends_alone", 4, dict(pp=4, **fields(pipeline_model_parallel_layout="E|(t|)*6L")), ["full", "lora", "odd"]),
    ("pp4_embedding_alone", 4, dict(pp=4, **fields(pipeline_model_parallel_layout="E|t*3|t*3|L")), ["recompute"]),
    (
        "pp4_zb",
        4,
        dict(pp=4, **fields(pipeline_schedule="zb-h1", num_layers_in_first_pipeline_stage=3)),
        ["full_packed", "single"],
    ),
    ("tp2_zb", 4, dict(tp=2, pp=2, sp=True, **fields(pipeline_schedule="zb-h1")), ["full", "odd_lora_packed"]),
    ("tp2_pp2_vpp3_sp", 4, dict(tp=2, pp=2, vpp=3, sp=True), ["full_packed", "lora_parts_packed"]),
    ("pp2_vpp3_dp2", 4, dict(pp=2, vpp=3), ["full", "mean_of_means"]),
    (
        "pp2_groups",
        2,
        dict(pp=2, **fields(num_layers_per_virtual_pipeline_stage=1, microbatch_group_size_per_vp_stage=3)),
        ["odd", "single"],
    ),
]


def pairs(everything):
    for name, processes, layout, fast in PIPELINES:
        for variant in ALL if everything else fast:
            if name.endswith("dp2") and ALL[variant].get("micro_batches", 4) % 2:
                continue
            yield processes, variant, name, dict(name=f"{variant}-{name}", layout=layout, steps=STEPS, **ALL[variant])


@pytest.fixture(
    scope="module",
    params=[("qwen3", False), *(pytest.param((model, True), marks=pytest.mark.slow) for model in ("qwen3", "llama"))],
    ids=lambda param: param[0] + ("_all" if param[1] else ""),
)
def results(request, tmp_path_factory):
    model, everything = request.param
    work = tmp_path_factory.mktemp(model)
    family, overrides = MODELS[model]
    tiny.save(family, work / "model", **overrides)
    chosen = list(pairs(everything))
    used = {variant for _, variant, _, _ in chosen}
    found = run_cases(work / "model", [dict(name=name, steps=STEPS, **ALL[name]) for name in ALL if name in used], 1, work)
    for processes in (2, 4):
        cases = [case for count, _, _, case in chosen if count == processes]
        for name, count, layout, _ in PIPELINES:
            if count == processes:
                cases.append(dict(name=f"untouched-{name}", layout=layout, steps=0, save=str(work / f"untouched-{name}")))
        if processes == 2:
            cases.append(dict(name="full-pp2", layout=dict(pp=2), steps=STEPS))
            dropout = dict(layout=dict(pp=2, vpp=3), steps=3, seed=5, fields=dict(hidden_dropout=0.1))
            cases += [dict(name="dropout", **dropout), dict(name="dropout_again", **dropout)]
        else:
            # The first stage holds the embedding alone: what lives there is what it sends.
            alone = dict(pp=4, **fields(pipeline_model_parallel_layout="E|tt|tt|ttL"))
            cases.append(dict(name="peak", layout=alone, steps=0, peak=[8, 128, 8]))
        found.update(run_cases(work / "model", cases, processes, work))
    return found, work, request.param


@pytest.mark.parametrize("pipeline", [name for name, _, _, _ in PIPELINES])
def test_same_as_one_rank(results, pipeline):
    found, _, (model, everything) = results
    for processes, variant, name, case in pairs(everything):
        if name == pipeline:
            same_training(found[variant], found[case["name"]], case, processes, model)


def test_split_backward_is_the_same_backward(results):
    """Zero bubble changes when weight gradients are computed, not what they are."""
    found, _, _ = results
    plain, split = found["full-pp2"], found["full-pp2_zb"]
    assert close(split["losses"], plain["losses"], 1e-6)
    assert close(split["norms"], plain["norms"], 1e-6)
    for name, tensor in plain["weights"].items():
        assert tiny.relative(split["weights"][name], tensor) < 1e-6, name


def test_round_trip_is_bit_identical(results):
    from safetensors.torch import load_file

    found, work, _ = results
    base = {}
    for file in (work / "model").glob("*.safetensors"):
        base.update(load_file(file))
    for name, _, _, _ in PIPELINES:
        saved = {}
        for file in (work / f"untouched-{name}").glob("*.safetensors"):
            saved.update(load_file(file))
        for copy in (saved, found[f"untouched-{name}"]["weights"]):
            assert copy.keys() == base.keys()
            for key, tensor in base.items():
                assert torch.equal(copy[key], tensor), (name, key)


def test_dropout_is_reproducible(results):
    found, _, _ = results
    assert found["dropout"]["losses"] == found["dropout_again"]["losses"]
    assert found["dropout"]["losses"] != found["full-pp2"]["losses"][:3]
    for name, tensor in found["dropout"]["weights"].items():
        assert torch.equal(tensor, found["dropout_again"]["weights"][name]), name


def test_outputs_are_freed_once_sent(results):
    """Four micro-batches are in flight on the first of four stages; it keeps the output of none but the one it sends."""
    found, _, _ = results
    hidden = 8 * 128 * 64 * 4  # bytes of one micro-batch's hidden states
    first = found["peak"]["peaks"][0]
    # The one on its way, the one just made, a gradient that is awaited and the one in use.
    assert first < 4 * hidden + hidden // 2, first / hidden


@pytest.mark.parametrize("layout", ["vpp", "zb"])
def test_a_lost_stage_ends_the_others(tmp_path, layout):
    """Killed in the middle of a step, without a launcher that would clean up: the other stages raise."""
    tiny.save("qwen3_tied", tmp_path / "model", num_hidden_layers=8)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(HERE / "failing_worker.py"), f"lost_stage_{layout}", str(tmp_path / "model"), str(tmp_path)]
    ranks = [
        subprocess.Popen(
            command,
            env={**environment(), "RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(4)
    ]
    start = time.monotonic()
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert time.monotonic() - start < 100
    assert ranks[2].returncode == -signal.SIGKILL
    for rank in (0, 1, 3):
        assert ranks[rank].returncode == 3, outputs[rank]
        assert re.search(r"RANK \d (RuntimeError|DistBackendError)", outputs[rank]), outputs[rank]
