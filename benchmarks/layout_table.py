"""The tables of evidence in docs/parallelism.md: `python benchmarks/layout_table.py` (an hour on two cores).

Runs the matrices of layouts in tests/distributed, every comparison of which writes down what it found, and
benchmarks/plan_memory.py, whose counted bytes are compared with the formulae of docs/planning.md written out here once more.
`--record FILE` and `--plan FILE ...` take what earlier runs wrote (`MCB_RECORD_LAYOUTS=FILE pytest ...`, `plan_memory.py --json`)."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import plan_memory

ROOT = Path(__file__).parents[1]
MATRICES = ["layouts", "pipelines", "context_parallel", "optimizer", "eight_ranks", "moe"]


def run_matrices(record):
    tests = [str(ROOT / "tests" / "distributed" / f"test_{name}.py") for name in MATRICES]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "same_as_one_rank or every_combination", *tests]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "MCB_RECORD_LAYOUTS": str(record)}, check=True)


def run_plan(folder):
    for processes in (1, 2, 4):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        out = folder / f"plan{processes}.json"
        subprocess.run([*command, plan_memory.__file__, "--json", str(out)], cwd=ROOT, check=True)
        yield out


def small(value):
    return f"{value:.0e}".replace("e-0", "e-") if value else "0"


def mantissa(text):
    return f"`{text}`"


# ---- Losses ----

TRANSPORTS = {"p2p": "ring", "all_gather": "all-gather", "a2a": "all-to-all"}
SHARDING = {"optim_grads": "ZeRO 2", "optim_grads_params": "ZeRO 3"}


def layout_name(case, processes):
    """A layout in the words of the docs: 'TP 2 SP, PP 2 x 3'."""
    layout, options = case["layout"], case.get("options", {})
    fields = {**layout.get("fields", {}), **case.get("fields", {})}
    sizes = {key: layout.get(key, 1) for key in ("tp", "cp", "pp", "vpp")}
    parts = []
    if sizes["tp"] > 1:
        parts.append(f"TP {sizes['tp']}" + (" SP" if layout.get("sp") else ""))
    if sizes["cp"] > 1:
        parts.append(f"CP {sizes['cp']} {TRANSPORTS[fields.get('cp_comm_type', 'p2p')]}")
    if sizes["pp"] > 1:
        parts.append(f"PP {sizes['pp']}" + (f" x {sizes['vpp']}" if sizes["vpp"] > 1 else ""))
    if fields.get("pipeline_schedule") == "zb-h1":
        parts.append("ZB-H1")
    if "pipeline_model_parallel_layout" in fields:
        parts.append("`" + fields["pipeline_model_parallel_layout"].replace("|", "\\|") + "`")
    if "num_layers_per_virtual_pipeline_stage" in fields:
        parts.append(f"{fields['num_layers_per_virtual_pipeline_stage']} layer a virtual stage")
    if "num_layers_in_first_pipeline_stage" in fields:
        parts.append(f"{fields['num_layers_in_first_pipeline_stage']} layers first")
    for key in ("ep", "etp"):
        if layout.get(key, 1) > 1:
            parts.append(f"{key.upper()} {layout[key]}")
    if fields.get("moe_token_dispatcher_type") == "allgather":
        parts.append("all-gather dispatch")
    data = processes // (sizes["tp"] * sizes["cp"] * sizes["pp"])
    if data > 1:
        parts.append(f"DP {data}")
    if "data_parallel_sharding_strategy" in options:
        parts.append(SHARDING[options["data_parallel_sharding_strategy"]])
    if options.get("overlap_grad_reduce"):
        parts.append("overlapped")
    return ", ".join(parts)


def column(case):
    """What is trained: 'full', 'full packed', 'LoRA', 'LoRA packed' or 'others'."""
    packed = case.get("packed") in (True, "padded")
    plain = not case.get("fields") and case.get("packed") != "unequal" and case.get("micro_batches", 4) == 4
    if not plain or "calculate_per_token_loss" in case.get("options", {}):
        return "others"
    return ("LoRA" if case.get("lora") else "full") + (" packed" if packed else "")


COLUMNS = ["full", "full packed", "LoRA", "LoRA packed", "others"]


def loss_table(lines):
    rows = defaultdict(lambda: defaultdict(list))
    for line in lines:
        key = (line["processes"], layout_name(line["case"], line["processes"]))
        rows[key][column(line["case"])].append(line["loss"])
        rows[key]["parameters"].append(line["parameters"])
    yield "| ranks | layout | " + " | ".join(COLUMNS) + " | parameters |"
    yield "|" + "---|" * (len(COLUMNS) + 3)
    for (processes, name), found in sorted(rows.items(), key=lambda item: (item[0][0], item[0][1])):
        cells = [small(max(found[key])) if found[key] else "" for key in [*COLUMNS, "parameters"]]
        yield f"| {processes} | {name} | " + " | ".join(cells) + " |"


MODES = {
    "plain": "all-reduce, whole optimizer",
    "plain_overlap": "the same, overlapped",
    "sharded": "distributed optimizer (default)",
    "overlap": "the same, overlapped",
    "offload": "60 % of the states in host memory",
    "zero2": "`optim_grads`",
    "zero3": "`optim_grads_params`",
    "distributed": "Muon, its products distributed",
    "duplicated": "Muon, its products repeated",
}


def optimizer_table(lines):
    rows = defaultdict(lambda: defaultdict(list))
    layouts = {}
    for line in lines:
        case = line["case"]
        _, mode, layout = case["name"].split("-")
        layouts[layout] = layout_name({**case, "options": {}, "fields": {}}, line["processes"])
        rows[mode][layout].append((line["loss"], line["parameters"]))
    yield "| | " + " | ".join(layouts.values()) + " | parameters |"
    yield "|" + "---|" * (len(layouts) + 2)
    for mode, name in MODES.items():
        found = rows[mode]
        cells = [small(max(loss for loss, _ in found[layout])) if found[layout] else "" for layout in layouts]
        yield f"| {name} | " + " | ".join(cells) + f" | {small(max(p for pairs in found.values() for _, p in pairs))} |"


# ---- Communication ----


class Sizes:
    """The letters of docs/planning.md for a case: bytes and counts of rank 0."""

    def __init__(self, case):
        fields = {**plan_memory.MODEL, **case["fields"]}

        def given(name, default=1):
            return fields.get(name, default)

        tp, self.cp, pp = (
            given("tensor_model_parallel_size"),
            given("context_parallel_size"),
            given("pipeline_model_parallel_size"),
        )
        self.m, self.e = case["micro_batches"], 2 if given("params_dtype", "") == "bfloat16" else 4
        self.t = case["rows"] * case["length"] // self.cp
        self.h, layers, ffn = fields["hidden_size"], fields["num_layers"], fields["ffn_hidden_size"]
        self.layers = layers // pp
        self.q = fields["num_attention_heads"] * fields["kv_channels"] // tp
        self.kv = fields["num_query_groups"] * fields["kv_channels"] // tp
        self.b = self.t * self.h * self.e
        self.shard = tp if given("sequence_parallel", False) else 1
        matrices = self.h * (2 * self.q + 2 * self.kv) + 3 * self.h * ffn // tp
        vocabulary = -(-fields["padded_vocab_size"] // tp) * self.h
        self.parameters = layers * (matrices + 2 * self.h) + 2 * vocabulary + self.h
        self.layer_parameters = layers * (matrices + 2 * self.h)


# case -> (what, group, operation, the formula in words, the formula in numbers)
VOLUMES = [
    ("tp2", "tp", "all_reduce", "m B (4 a layer + 2) + m 12 t", lambda s: s.m * s.b * (4 * s.layers + 2) + s.m * 12 * s.t),
    ("tp2_sp", "tp", "all_gather", "m B (6 a layer + 2): inputs again in backward", lambda s: s.m * s.b * (6 * s.layers + 2)),
    ("tp2_sp", "tp", "reduce_scatter", "m B (4 a layer + 2)", lambda s: s.m * s.b * (4 * s.layers + 2)),
    (
        "tp2_sp",
        "tp",
        "all_reduce",
        "m 12 t + 4 h (2 a layer + 1): norms",
        lambda s: s.m * 12 * s.t + 4 * s.h * (2 * s.layers + 1),
    ),
    (
        "cp2",
        "cp",
        "send",
        "m a layer: (c - 1) 2 (2 t kv e) + c 2 t kv 4",
        lambda s: s.m * s.layers * ((s.cp - 1) * 2 * 2 * s.t * s.kv * s.e + s.cp * 2 * s.t * s.kv * 4),
    ),
    ("cp2_gather", "cp", "all_gather", "m a layer: 2 (2 c t kv e)", lambda s: s.m * s.layers * 2 * 2 * s.cp * s.t * s.kv * s.e),
    ("cp2_gather", "cp", "reduce_scatter", "m a layer: 2 c t kv 4", lambda s: s.m * s.layers * 2 * s.cp * s.t * s.kv * 4),
    (
        "cp2_a2a",
        "cp",
        "all_to_all",
        "m a layer: 2 (t (q + 2 kv) e + t q e)",
        lambda s: s.m * s.layers * 2 * (s.t * (s.q + 2 * s.kv) * s.e + s.t * s.q * s.e),
    ),
    ("pp2", "pp", "send", "m B", lambda s: s.m * s.b),
    ("pp2_vpp2", "pp", "send", "m B (2 + 1): both chunks forward, one back", lambda s: s.m * s.b * 3),
    ("tp2_pp2", "pp", "send", "m B / TP", lambda s: s.m * s.b // s.shard),
    ("pp2_tied", "embd", "all_reduce", "4 V h", lambda s: 4 * 4000 * s.h),
    ("dp2", "dp-cp", "reduce_scatter", "4 x trainable", lambda s: 4 * s.parameters),
    ("dp2", "dp-cp", "all_gather", "e x trainable", lambda s: s.e * s.parameters),
    ("dp2_unsharded", "dp-cp", "all_reduce", "4 x trainable", lambda s: 4 * s.parameters),
    ("dp2_grads", "dp-cp", "reduce_scatter", "m 4 x trainable", lambda s: s.m * 4 * s.parameters),
    (
        "dp2_sharded",
        "dp-cp",
        "all_gather",
        "m e (parameters + layers')",
        lambda s: s.m * s.e * (s.parameters + s.layer_parameters),
    ),
]


def volume_table(plans):
    yield "| layout | group | operation | formula | counted, bytes a step | formula, bytes | |"
    yield "|---|---|---|---|---|---|---|"
    for name, group, operation, words, formula in VOLUMES:
        (first,) = [found for found in plans[name] if found["rank"] == 0]
        case = plan_memory.CASES[name]
        counted, expected = first["communication"][group][operation]["bytes"], formula(Sizes(case))
        planned = first["planned_communication"][group][operation]["bytes"]
        assert counted == planned, (name, counted, planned)
        padding = "equal" if counted == expected else f"+{100 * (counted / expected - 1):.2f} %"
        yield f"| {name} | {group} | {operation} | {words} | {counted:,} | {expected:,} | {padding} |"


def replace(text, name, lines):
    begin, end = f"<!-- {name}: benchmarks/layout_table.py -->\n", f"<!-- end of {name} -->"
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return head + begin + "\n" + "\n".join(lines) + "\n\n" + end + tail


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--plan", type=Path, nargs="*")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "parallelism.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        record = arguments.record or Path(work) / "layouts.jsonl"
        if not arguments.record:
            run_matrices(record)
        lines = [json.loads(line) for line in record.read_text().splitlines()]
        plans = {}
        for path in arguments.plan or run_plan(Path(work)):
            plans.update(json.loads(path.read_text()))
    lines = [line for line in lines if line["steps"] == 20]
    optimizer = [line for line in lines if line["test"] == "test_optimizer"]
    text = arguments.docs.read_text()
    text = replace(text, "losses", loss_table([line for line in lines if line not in optimizer]))
    text = replace(text, "optimizer", optimizer_table(optimizer))
    text = replace(text, "volumes", volume_table(plans))
    arguments.docs.write_text(text)
    print(f"{len(lines)} runs, largest difference of a loss {max(line['loss'] for line in lines):.1e}")


if __name__ == "__main__":
    main()
