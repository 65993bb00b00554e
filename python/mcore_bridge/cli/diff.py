"""mcore-bridge diff A B: two checkpoints compared tensor by tensor, whatever their shards."""

import json

from .arguments import DiffArguments, parse


def _number(value):
    return "inf" if value is None else f"{value:.3g}"


def _differs(row, tolerance):
    if row["identical"]:
        return False
    if "relative" not in row:
        return True
    return tolerance == 0 or row["relative"] is None or row["relative"] > tolerance


def run(command, argv):
    words = []
    while argv and not argv[0].startswith("-") and len(words) < 2:
        words.append(argv[0])
        argv = argv[1:]
    arguments = parse(DiffArguments, command, [*(["--models", *words] if words else []), *argv])
    if len(arguments.models) != 2:
        raise ValueError("which checkpoints? mcore-bridge diff A B")
    from ..bridge import diff_checkpoints
    from .export import byte_progress

    with byte_progress("Comparing") as progress:
        content = diff_checkpoints(*arguments.models, dequantize=arguments.dequantize, progress=progress)
    for row in content["tensors"]:
        row["differs"] = _differs(row, arguments.tolerance)
    different = sum(row["differs"] for row in content["tensors"])
    others = {name: content[name] for name in ("missing", "extra", "wrong_shape")}
    equal = not different and not any(others.values())
    if arguments.json:
        print(json.dumps({**content, "equal": equal, "tolerance": arguments.tolerance}, indent=2))
        return int(not equal)
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None)
    rows = [row for row in content["tensors"] if arguments.all or row["differs"]]
    if rows:
        table = Table(title=" against ".join(arguments.models))
        for heading in ("tensor", "dtypes", "largest", "relative", ""):
            table.add_column(heading, justify="right" if heading in ("largest", "relative") else "left", no_wrap=True)
        for row in rows:
            dtypes = row["dtype_a"] if row["dtype_a"] == row["dtype_b"] else f"{row['dtype_a']}, {row['dtype_b']}"
            largest = _number(row["max_abs"]) if "max_abs" in row else ""
            relative = _number(row["relative"]) if "relative" in row else ""
            table.add_row(row["name"], dtypes, largest, relative, "differs" if row["differs"] else "")
        console.print(table)
    for text, names in (("only in A", content["missing"]), ("only in B", content["extra"])):
        for name in names:
            console.print(f"{text}: {name}", highlight=False)
    for row in content["wrong_shape"]:
        console.print(f"shapes: {row['name']}: {row['a']} and {row['b']}", highlight=False)
    console.print(
        f"{'equal' if equal else 'different'}: {len(content['tensors'])} tensors compared, {different} differ, "
        f"{len(content['missing'])} only in A, {len(content['extra'])} only in B, {len(content['wrong_shape'])} of other shapes"
    )
    return int(not equal)
