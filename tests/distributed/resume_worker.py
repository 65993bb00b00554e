"""Runs training jobs one after the other in this process (or under torchrun): `resume_worker.py JOB.json OUT.json`.

A job is {name, command, argv} and any of: stop_after ends the run behind that step by a signal; die_after kills rank 1 (the first
time under torchrun); freeze_after stops rank 1 and asks rank 0 to end; full_disk names steps whose saves fail; recent are losses
before the first step; soak notes only what the process holds. Rank 0 writes, by name, the losses, the rows of every step (from all
data-parallel ranks) and what was said."""

import contextlib
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "python"))
import mcore_bridge as mb  # noqa: E402
from mcore_bridge.cli.arguments import TrainArguments, parse  # noqa: E402
from mcore_bridge.cli.launch import finish_distributed, init_distributed  # noqa: E402
from mcore_bridge.cli.train import _derived  # noqa: E402
from mcore_bridge.training.run import Run  # noqa: E402


def resources():
    """Resident MiB, open files and threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return [pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))]


class Observed(Run):
    """Notes what every step saw."""

    stop_after = None

    def _take_over(self):
        super()._take_over()
        self.spikes.recent.extend(self.job.get("recent", []))

    def _report(self, batch, result, *more):
        super()._report(batch, result, *more)
        if self.step % 100 == 0:
            self.resources.append(resources())
        if self.job.get("soak"):
            return  # what is seen would grow
        speaks = self.parallel.tp_rank == 0 and self.parallel.pp_rank == 0 and self.parallel.cp_rank == 0
        everywhere = self.control.gather(batch.rows if speaks else [])
        if everywhere is not None:
            rows = sorted([row["source"].rsplit("/", 1)[-1], row["row"]] for some in everywhere for row in some)
            self.seen.append([result.loss, result.grad_norm, result.lr, rows])
        if self.step == self.job.get("die_after") and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        if self.step == self.job.get("freeze_after"):
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        if self.step in self.job.get("full_disk", ()):  # files may not grow: the next save fails as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        elif self.job.get("full_disk"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if self.step + 1 == self.stop_after:  # seen when the next step begins
            os.kill(os.getpid(), signal.SIGTERM)


def run(job):
    arguments = _derived(parse(TrainArguments, job.get("command", "sft"), job["argv"]), job.get("command", "sft"))
    one = Observed.__new__(Observed)
    one.job, one.seen, one.resources, one.stop_after = job, [], [], job.get("stop_after")
    try:
        one.__init__(arguments, arguments.model)
        start = one.step
        one.train()
        return dict(start=start, steps=one.seen, resources=one.resources, output_dir=str(one.output_dir), error=None)
    except Exception as error:  # noqa: BLE001 - the test looks at it
        if job.get("error") is None:
            raise
        return dict(error=f"{type(error).__name__}: {error}")
    finally:
        mb.destroy_model_parallel()


def main():
    job_path, out_path = sys.argv[1:]
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    init_distributed(5)
    results = {}
    for job in json.loads(Path(job_path).read_text()):
        path = f"{out_path}.{job['name']}.txt" if int(os.environ.get("RANK", 0)) == 0 else os.devnull
        with open(path, "w") as said, contextlib.redirect_stdout(said):
            results[job["name"]] = run(job)
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(out_path).write_text(json.dumps(results))
    finish_distributed()


if __name__ == "__main__":
    main()
