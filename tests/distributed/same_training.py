"""One comparison for every layout: a split run against the same run on one rank."""

import json
import os
from pathlib import Path

import tiny

LOSS = 1e-5  # the largest difference of a loss, relative where the loss is above 1
NORM = 1e-3
FIRST_NORM = 1e-5  # before rounding has had steps to grow
LOGITS = 2e-4
WEIGHTS = 2e-3  # |difference| / |tensor| of every parameter at the end

# A file to which every comparison adds a line with what it found: benchmarks/layout_table.py makes the table of the docs from it.
RECORD = os.environ.get("MCB_RECORD_LAYOUTS")


def differs(actual, expected):
    return abs(actual - expected) / max(1.0, abs(expected))


def close(actual, expected, tolerance):
    return all(differs(a, b) <= tolerance for a, b in zip(actual, expected, strict=True))


def largest(actual, expected):
    """The largest relative difference of tensors by name, and whose it is."""
    assert actual.keys() == expected.keys()
    return max(((tiny.relative(actual[name], tensor), name) for name, tensor in expected.items()), default=(0.0, ""))


def same_training(expected, actual, case, processes, model):
    """`expected`, `actual`: worker.py's results of one rank and of the `case` on `processes` ranks."""
    what = f"{model} {case['name']}"
    assert expected["losses"][-1] < expected["losses"][0], "the reference does not learn"
    assert actual["loss_tokens"] == expected["loss_tokens"], what
    losses = list(zip(actual["losses"], expected["losses"], strict=True))
    parameters = {kind: largest(actual[kind], expected[kind]) for kind in ("weights", "adapter")}
    if RECORD:
        line = dict(
            test=Path(os.environ["PYTEST_CURRENT_TEST"].split("::")[0]).stem,
            model=model,
            processes=processes,
            case=case,
            steps=len(losses),
            loss=max(abs(a - b) for a, b in losses),
            parameters=max(parameters.values())[0],
        )
        with Path(RECORD).open("a") as file:
            file.write(json.dumps(line) + "\n")
    for step, (a, b) in enumerate(losses):
        assert differs(a, b) <= LOSS, f"{what}: loss of step {step}: {a} and {b}"
    assert abs(actual["norms"][0] / expected["norms"][0] - 1) < FIRST_NORM, f"{what}: norm of the first step"
    assert close(actual["norms"], expected["norms"], NORM), what
    assert differs(actual["evaluated"], expected["evaluated"]) <= LOSS, what
    assert tiny.relative(actual["logits"], expected["logits"]) < LOGITS, what
    for difference, name in parameters.values():
        assert difference < WEIGHTS, f"{what}: {name} differs by {difference}"
