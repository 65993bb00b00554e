"""Every layout trains as one rank does: losses, gradient norms, final weights, adapters; and saves the same files."""

import pytest
import tiny
import torch
from launch import run_cases
from same_training import same_training

STEPS = 20

# (name, processes, layout)
LAYOUTS = [
    ("tp2", 2, dict(tp=2)),
    ("pp2", 2, dict(pp=2)),
    ("dp2", 2, dict()),
    ("tp2_sp", 2, dict(tp=2, sp=True)),
    ("tp2_pp2_sp", 4, dict(tp=2, pp=2, sp=True)),
    ("tp4_two_kv_heads", 4, dict(tp=4)),
    ("tp4_sp_two_kv_heads", 4, dict(tp=4, sp=True)),
    ("pp4_uneven", 4, dict(pp=4, fields=dict(num_layers_in_first_pipeline_stage=3))),
    ("tp2_dp2", 4, dict(tp=2)),
    ("pp2_dp2", 4, dict(pp=2)),
]

MODELS = {
    # Tied embeddings, QK norms, biases; two KV heads so that TP 4 repeats them.
    "qwen3": ("qwen3_tied", dict(num_key_value_heads=2, num_hidden_layers=6)),
    # Untied, biases everywhere, llama3 rope.
    "llama": ("llama3_biases_tied", dict(num_key_value_heads=2, num_hidden_layers=6, tie_word_embeddings=False)),
}

VARIANTS = {
    "full": dict(),
    "full_packed": dict(packed=True),
    "lora": dict(lora=dict(r=4, lora_alpha=8)),
    "lora_parts_packed": dict(
        packed=True,
        lora=dict(r=3, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj", "linear_proj"]),
    ),
    "recompute": dict(lora=dict(r=4, lora_alpha=8), fields=dict(recompute_granularity="full", recompute_num_layers=2)),
    "mean_of_means": dict(options=dict(calculate_per_token_loss=False, clip_grad=0.1)),
}


CASES = {
    (variant, name): dict(name=f"{variant}-{name}", layout=layout, steps=STEPS, **settings)
    for variant, settings in VARIANTS.items()
    for name, _, layout in LAYOUTS
}
PROCESSES = {name: count for name, count, _ in LAYOUTS}


@pytest.fixture(scope="module", params=["qwen3", pytest.param("llama", marks=pytest.mark.slow)])
def results(request, tmp_path_factory):
    work = tmp_path_factory.mktemp(request.param)
    family, overrides = MODELS[request.param]
    tiny.save(family, work / "model", **overrides)
    single = [dict(name=variant, steps=STEPS, **settings) for variant, settings in VARIANTS.items()]
    found = run_cases(work / "model", single, 1, work)
    for processes in (2, 4):
        cases = [dict(case) for (_, name), case in CASES.items() if PROCESSES[name] == processes]
        cases += [dict(name=f"untouched-{name}", layout=layout, steps=0) for name, count, layout in LAYOUTS if count == processes]
        for case in cases:
            if case["name"].startswith(("full-", "untouched-")):
                case["save"] = str(work / case["name"])
        found.update(run_cases(work / "model", cases, processes, work))
    return found, work, request.param


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", [name for name, _, _ in LAYOUTS])
def test_same_as_one_rank(results, variant, layout):
    found, _, model = results
    same_training(found[variant], found[f"{variant}-{layout}"], CASES[variant, layout], PROCESSES[layout], model)


def test_saved_files_hold_the_weights(results):
    from mcore_bridge.bridge import inspect_checkpoint
    from safetensors.torch import load_file

    found, work, _ = results
    for name, _, _ in LAYOUTS:
        folder = work / f"full-{name}"
        saved = {}
        for file in sorted(folder.glob("*.safetensors")):
            saved.update(load_file(file))
        expected = found[f"full-{name}"]["weights"]
        assert saved.keys() == expected.keys()
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
        assert inspect_checkpoint(folder)["total_bytes"] == sum(t.nbytes for t in saved.values())
        for key, tensor in expected.items():
            assert torch.equal(saved[key], tensor), (name, key)


def base_of(work):
    from safetensors.torch import load_file

    base = {}
    for file in (work / "model").glob("*.safetensors"):
        base.update(load_file(file))
    return base


def test_round_trip_is_bit_identical(results):
    """Hugging Face -> any layout -> Hugging Face, through the files and through the stream."""
    from safetensors.torch import load_file

    found, work, _ = results
    base = base_of(work)
    for name, _, _ in LAYOUTS:
        saved = {}
        for file in (work / f"untouched-{name}").glob("*.safetensors"):
            saved.update(load_file(file))
        for copy in (saved, found[f"untouched-{name}"]["weights"]):
            assert copy.keys() == base.keys()
            for key, tensor in base.items():
                assert torch.equal(copy[key], tensor), (name, key)


def test_base_is_frozen_under_lora(results, tmp_path):
    found, work, _ = results
    base = base_of(work)
    for name, result in found.items():
        if name.startswith("lora"):
            for key, tensor in result["weights"].items():
                assert torch.equal(tensor, base[key]), (name, key)


def test_random_weights_and_reruns(tmp_path):
    """Initialisation does not depend on the layout, and the same run twice is bit-identical."""
    tiny.save("qwen3_tied", tmp_path / "model")
    case = dict(steps=5, initialize=True)
    alone = run_cases(
        tmp_path / "model",
        [dict(name="a", **case), dict(name="b", **case), dict(name="start", steps=0, initialize=True)],
        1,
        tmp_path,
    )
    layout = dict(tp=2, pp=2, sp=True)
    split = run_cases(
        tmp_path / "model",
        [
            dict(name="a", layout=layout, **case),
            dict(name="b", layout=layout, **case),
            dict(name="start", layout=layout, steps=0, initialize=True),
        ],
        4,
        tmp_path,
    )
    for found in (alone, split):
        assert found["a"]["losses"] == found["b"]["losses"] and found["a"]["norms"] == found["b"]["norms"]
        for key, tensor in found["a"]["weights"].items():
            assert torch.equal(tensor, found["b"]["weights"][key])
    for key, tensor in alone["start"]["weights"].items():
        assert torch.equal(tensor, split["start"]["weights"][key])
