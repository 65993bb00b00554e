"""Trains again and again until it is done, being killed at random moments: `kill_worker.py SEED KILLS RANKS TARGET... -- ARGV...`.

The ranks are forked from this process, which has imported everything once. A moment is chosen in seconds after all ranks have
begun; the time of an uninterrupted run (the first, with another output folder) says from which range. Prints a JSON line."""

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
    """Exit codes once all have ended, or None when `until` came first. When one fails, the others get a few seconds, as torchrun
    gives them."""
    codes, deadline = {}, None
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    codes[child] = os.waitstatus_to_exitcode(status)
                    if codes[child] and deadline is None:
                        deadline = time.monotonic() + 20
        if until is not None and time.monotonic() >= until:
            return None
        if deadline and time.monotonic() > deadline:
            end(children, codes)
        time.sleep(0.005)
    return [codes[child] for child in children]


def end(children, codes=()):
    for child in children:
        if child not in codes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def main():
    seed, kills, ranks, log, whole, killed = (int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:7])
    argv = sys.argv[8:]
    begin = time.monotonic()
    codes = wait(start(ranks, [*argv, "--output_dir", whole], f"{log}-whole"))
    assert codes == [0] * ranks, codes
    duration = time.monotonic() - begin
    rng, done, attempts, inside = random.Random(seed), 0, 0, 0
    while True:
        attempts += 1
        assert attempts < 20 * (kills + 1), "it never gets anywhere"
        children = start(ranks, [*argv, "--output_dir", killed, "--resume_from_checkpoint", "auto"], f"{log}-killed")
        if done == kills:
            codes = wait(children)
            assert codes == [0] * ranks, codes
            break
        if wait(children, time.monotonic() + rng.uniform(0.2, 0.9) * duration) is not None:
            end_of_run = Path(killed) / "none"
            assert not end_of_run.exists()
            continue  # it was done before its time
        victims = children if rng.random() < 0.4 else [rng.choice(children)]
        end(victims)
        inside += any(Path(killed).glob(".checkpoint-*.saving*"))
        done += 1
        codes = wait(children)
        assert all(code != 0 for code in codes), codes
    print(json.dumps(dict(kills=done, attempts=attempts, inside_a_save=inside, seconds=duration)))


if __name__ == "__main__":
    main()
