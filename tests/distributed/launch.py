"""Starts workers: alone, or under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
# Seconds before a launch is taken to hang; a machine that others load needs more.
LIMIT = float(os.environ.get("MCB_LAUNCH_LIMIT", "1200"))


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def launch(arguments, processes, timeout=LIMIT, torchrun=()):
    """Runs a Python command line on `processes` ranks (1: without torchrun); returns the finished process. `torchrun`: further
    flags of it."""
    prefix = [sys.executable]
    if processes > 1:
        prefix += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *torchrun]
    return subprocess.run(
        [*prefix, *map(str, arguments)], env=environment(), timeout=timeout, capture_output=True, text=True, check=False
    )


def run_cases(folder, cases, processes, work):
    """Results of worker.py by case name."""
    work.mkdir(parents=True, exist_ok=True)
    job, out = work / f"job{processes}.json", work / f"out{processes}.pt"
    job.write_text(json.dumps({"folder": str(folder), "cases": cases}))
    finished = launch([HERE / "worker.py", job, out], processes)
    if finished.returncode:
        raise AssertionError(f"worker failed on {processes} processes:\n{finished.stdout[-4000:]}\n{finished.stderr[-8000:]}")
    return torch.load(out, weights_only=True)
