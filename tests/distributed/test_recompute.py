"""Recomputation, offload and overlap change what is kept and when it is sent, never the numbers; dropout draws what it should."""

import pytest
import tiny
import torch
from launch import run_cases

DROPOUT = dict(hidden_dropout=0.2, attention_dropout=0.1)
SAVING = {
    "full": dict(recompute_granularity="full"),
    "full_two": dict(recompute_granularity="full", recompute_num_layers=2),
    "block": dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=2),
    "mlp": dict(recompute_granularity="selective", recompute_modules=["mlp"]),
    "core": dict(recompute_granularity="selective"),
    "several": dict(recompute_granularity="selective", recompute_modules=["core_attn", "mlp", "layernorm"]),
    "offload": dict(cpu_offloading=True, cpu_offloading_num_layers=3),
    "offload_mlp": dict(
        cpu_offloading=True, cpu_offloading_num_layers=4, recompute_granularity="selective", recompute_modules=["mlp"]
    ),
}
LORA = dict(r=4, lora_alpha=8, lora_dropout=0.3)
SPLIT = {"tp2": dict(tp=2), "tp2_sp": dict(tp=2, sp=True), "pp2": dict(pp=2), "cp2": dict(cp=2, fields=dict(cp_comm_type="a2a"))}
OVERLAP = dict(sp=True, fields=dict(tp_comm_overlap=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("recompute")
    tiny.save("qwen3_tied", path / "model")
    return path


def case(name, fields=None, steps=3, **more):
    return dict(name=name, steps=steps, packed="padded", fields=fields or {}, **more)


def test_one_rank_is_bit_identical(folder):
    cases = []
    for start, dropout, lora in (("plain", {}, None), ("dropout", DROPOUT, None), ("lora", DROPOUT, LORA)):
        cases += [case(f"{start}-{name}", {**dropout, **fields}, lora=lora) for name, fields in {"": {}, **SAVING}.items()]
    found = run_cases(folder / "model", [*cases, case("dropout-again", DROPOUT)], 1, folder)
    for start in ("plain", "dropout", "lora"):
        for name in [*SAVING, *(["again"] if start == "dropout" else [])]:
            expected, actual = found[f"{start}-"], found[f"{start}-{name}"]
            assert actual["losses"] == expected["losses"] and actual["norms"] == expected["norms"], (start, name)
            assert all(torch.equal(actual["weights"][key], tensor) for key, tensor in expected["weights"].items())
    assert found["dropout-"]["losses"] != found["plain-"]["losses"]


def test_split_ranks(folder):
    """The same with ranks that draw alike and apart; what is held alike stays alike. Overlap is the plain path up to rounding."""
    cases = []
    for layout, settings in SPLIT.items():
        for name, fields in (("", {}), ("again", {}), ("full", SAVING["full"]), ("several", SAVING["several"])):
            merged = {**settings, "fields": {**settings.get("fields", {}), **DROPOUT, **fields}}
            cases.append(case(f"{layout}-{name}", layout=merged, lora=LORA if name != "again" and layout == "tp2" else None))
    cases = [c for c in cases if c["name"] != "tp2-again"]
    cases += [case("overlap", layout=dict(tp=2, **OVERLAP), steps=20), case("no-overlap", layout=dict(tp=2, sp=True), steps=20)]
    cases += [case("overlap-lora", layout=dict(tp=2, **OVERLAP), lora=dict(r=4, lora_alpha=8), steps=20)]
    found = run_cases(folder / "model", cases, 2, folder)
    for layout in SPLIT:
        expected = found[f"{layout}-"]
        for name in ("again", "full", "several"):
            actual = found.get(f"{layout}-{name}")
            if actual is None:
                continue
            assert actual["losses"] == expected["losses"], (layout, name)
            assert all(torch.equal(actual["weights"][key], tensor) for key, tensor in expected["weights"].items()), (layout, name)
    assert all(result["alike"] for result in found.values()), [n for n, r in found.items() if not r["alike"]]
    alone = run_cases(
        folder / "model",
        [case("full", steps=20), case("lora", steps=20, lora=dict(r=4, lora_alpha=8)), case("dropout", DROPOUT)],
        1,
        folder,
    )
    for name, expected in (("overlap", "full"), ("no-overlap", "full"), ("overlap-lora", "lora")):
        for a, b in zip(found[name]["losses"], alone[expected]["losses"], strict=True):
            assert abs(a - b) <= 1e-5 * max(1.0, abs(b)), name
    sent = {name: found[name]["volume"]["tp"] for name in ("overlap", "no-overlap")}
    moved = {name: sum(count["wire_bytes"] for count in volume.values()) for name, volume in sent.items()}
    assert moved["overlap"] == moved["no-overlap"], "the ring sends what the collectives would"
    # Other masks than one rank's, but dropout of the same strength.
    assert found["tp2_sp-"]["losses"][0] != alone["dropout"]["losses"][0]
    assert found["tp2_sp-"]["losses"][0] == pytest.approx(alone["dropout"]["losses"][0], rel=0.2)


@pytest.mark.slow
def test_overlap_on_four_ranks(folder):
    four = [
        case(f"overlap{lora is not None}", layout=dict(tp=4, **OVERLAP), lora=lora, steps=20)
        for lora in (None, dict(r=4, lora_alpha=8))
    ]
    found = run_cases(folder / "model", four, 4, folder)
    alone = run_cases(
        folder / "model",
        [case(f"overlap{lora is not None}", lora=lora, steps=20) for lora in (None, dict(r=4, lora_alpha=8))],
        1,
        folder,
    )
    for name, expected in alone.items():
        for a, b in zip(found[name]["losses"], expected["losses"], strict=True):
            assert abs(a - b) <= 1e-5 * max(1.0, abs(b)), name
