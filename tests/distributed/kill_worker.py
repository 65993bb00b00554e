"""Trains again and again until it is done, being killed at random moments: `kill_worker.py SEED KILLS RANKS WORK ARGV...`.

WORK/whole is a run nobody disturbs; WORK/sync and WORK/async share the kills, saving in the fore- and background. The ranks are
forked from this process, which has imported everything once. Most kills come while one of the next checkpoints is written or
shortly after it, some while a run starts. Prints a JSON line for each folder."""

import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "python"))
import mcore_bridge.bridge  # noqa: E402, F401
import mcore_bridge.training.run  # noqa: E402, F401
import torch  # noqa: E402
import transformers  # noqa: E402, F401
from mcore_bridge.cli.main import main as command  # noqa: E402


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(ranks, argv, log):
    port = free_port()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            output = os.open(f"{log}-{rank}.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )  # fmt: skip
            torch.set_num_threads(1)
            code = 1
            try:
                code = command(argv)
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return children


def wait(children, until=None):
    """Exit codes once all have ended, or None when `until()` held first. When one fails, the others get a few seconds to see it by
    themselves, then SIGTERM, then SIGKILL, as by torchrun."""
    codes, deadlines = {}, []
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    if codes[child] and not deadlines:
                        deadlines = [(time.monotonic() + 3, signal.SIGTERM), (time.monotonic() + 20, signal.SIGKILL)]
        if until is not None and until():
            return None
        if deadlines and time.monotonic() > deadlines[0][0]:
            end(children, codes, deadlines.pop(0)[1])
            deadlines = deadlines or [(float("inf"), 0)]
        time.sleep(0.002)
    return [codes[child] for child in children]


def end(children, codes=(), number=signal.SIGKILL):
    for child in children:
        if child not in codes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)


def moment(rng, folder, begun):
    """until() for wait(): a while after the start, or, mostly, after the save of one of the next steps has begun."""
    if rng.random() < 0.1:
        time_of_start = time.monotonic() + rng.uniform(0.1, 1)
        return lambda: time.monotonic() > time_of_start
    step = begun + 1 + rng.randrange(3)
    pause, seen = rng.choice([0, rng.uniform(0, 0.02), rng.uniform(0, 0.1)]), []

    def until():
        if not seen and (any(folder.glob(f".checkpoint-{step}.saving*")) or newest(folder) >= step):
            seen.append(time.monotonic() + pause)
        return bool(seen) and time.monotonic() >= seen[0]

    return until


def newest(folder):
    return max((int(path.name[11:]) for path in folder.glob("checkpoint-*")), default=0)


def survive(argv, kills, ranks, log, folder, rng):
    """Trains into a folder until it is done, through `kills` kills."""
    done = attempts = inside = began = 0
    while True:
        attempts += 1
        assert attempts < 20 * (kills + 1), "it never gets anywhere"
        begun = newest(folder)
        began += begun > 0
        children = start(ranks, [*argv, "--output_dir", str(folder), "--resume_from_checkpoint", "auto"], log)
        if done == kills:
            codes = wait(children)
            assert codes == [0] * ranks, codes
            return dict(kills=done, attempts=attempts, inside_a_save=inside, resumed=began)
        if wait(children, moment(rng, folder, begun)) is not None:
            continue  # it was done before its time
        victims = children if rng.random() < 0.4 else [rng.choice(children)]
        end(victims)
        inside += any(folder.glob(".checkpoint-*.saving*"))
        done += 1
        codes = wait(children)
        assert any(code != 0 for code in codes), codes


def main():
    seed, kills, ranks, work = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    argv = sys.argv[5:]
    codes = wait(start(ranks, [*argv, "--output_dir", str(work / "whole")], work / "log-whole"))
    assert codes == [0] * ranks, codes
    rng = random.Random(seed)
    for name, flag, count in (("sync", "false", kills // 2), ("async", "true", kills - kills // 2)):
        command = [*argv, "--async_save", flag]
        begin = time.monotonic()
        result = survive(command, count, ranks, work / f"log-{name}", work / name, rng)
        print(json.dumps(dict(mode=name, **result, seconds=round(time.monotonic() - begin))))


if __name__ == "__main__":
    main()
