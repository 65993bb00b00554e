"""Includes point one way only: a folder of src/ may use itself and the folders before it in ORDER."""

import re
import sys
from pathlib import Path

ORDER = [
    "core",
    "config",
    "plan",
    "parallel",
    "kernels",
    "layers",
    "families",
    "models",
    "tuners",
    "bridge",
    "train",
    "planner",
    "bindings",
]
# The config reader asks the family table how a config.json reads.
ALLOWED = {("config/hf_config.cpp", "families/family.h")}


def main():
    source = Path(__file__).parents[1] / "src"
    wrong = []
    for path in sorted(source.rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cu"):
            continue
        name = path.relative_to(source).as_posix()
        folder = name.split("/")[0]
        for include in re.findall(r'#include "([a-z_]+/[a-z_0-9/]+\.h)"', path.read_text()):
            other = include.split("/")[0]
            if other not in ORDER or (name, include) in ALLOWED:
                continue
            if ORDER.index(other) > ORDER.index(folder):
                wrong.append(f"src/{name} includes {include}: {folder}/ may not use {other}/")
    print("\n".join(wrong) or f"includes point one way: {' -> '.join(ORDER)}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
