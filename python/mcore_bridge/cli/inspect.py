"""mcore-bridge inspect: what a checkpoint holds, by its headers."""

import json
import re
from pathlib import Path

from .arguments import InspectArguments, parse


def _size(count):
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.1f} {unit}" if unit != "B" else f"{count} B"
        count /= 1024
    return ""


def _quantisation(path):
    """How config.json says the weights are quantised; any method, also one that cannot be loaded."""
    config = Path(path) / "config.json"
    if not config.exists():
        return ""
    content = json.loads(config.read_text())
    found = content.get("quantization_config") or (content.get("text_config") or {}).get("quantization_config") or {}
    block = found.get("weight_block_size")
    method = str(found.get("quant_method", "")).upper()
    return f"quantised: {method}" + (f" in blocks of {block[0]} x {block[1]}" if block else "") if method else ""


def run(command, argv):
    argv = (
        ["--model", *argv] if argv and not argv[0].startswith("-") and not argv[0].endswith((".yaml", ".yml", ".json")) else argv
    )
    arguments = parse(InspectArguments, command, argv)
    if not arguments.model:
        raise ValueError("which checkpoint? mcore-bridge inspect FOLDER")
    from ..bridge import inspect_checkpoint

    content = inspect_checkpoint(arguments.model)
    if arguments.json:
        print(json.dumps(content, indent=2))
        return 0
    rows = {}
    for tensor in content["tensors"]:
        name = tensor["name"] if arguments.names else re.sub(r"\.\d+\.", ".*.", tensor["name"])
        key = (name, tensor["dtype"], tuple(tensor["shape"]))
        count, total = rows.get(key, (0, 0))
        rows[key] = (count + 1, total + tensor["bytes"])
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{arguments.model}: {content['format']}")
    for heading in ("tensor", "dtype", "shape", "count", "size"):
        table.add_column(heading, justify="left" if heading in ("tensor", "dtype") else "right", no_wrap=True)
    for (name, dtype, shape), (count, total) in rows.items():
        table.add_row(name, dtype, " x ".join(map(str, shape)) or "scalar", str(count), _size(total))
    console = Console(width=None)
    console.print(table)
    for file in content["files"]:
        console.print(f"{file['name']}: {_size(file['bytes'])}")
    quantised = _quantisation(arguments.model)
    console.print(f"{len(content['tensors'])} tensors, {_size(content['total_bytes'])}" + (f", {quantised}" if quantised else ""))
    return 0
