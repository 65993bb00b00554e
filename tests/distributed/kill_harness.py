"""Kills saving ranks at random moments: `kill_harness.py FOLDER WORK KILLS SEED`.

Two ranks save states 1, 2, 3, ... into one folder (every element of state n is n), until one of them or both get SIGKILL. Then the
folder must hold one whole state, no older than the last that was reported done. The next pair goes on from there. At the end an
undisturbed save must leave nothing but the folder."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
import mcore_bridge as mb  # noqa: E402

RANKS = 2


def save_states(rank, folder, work, store, first, last, pipe):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), RANKS), rank=rank, world_size=RANKS)
    mb.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    config = mb.ModelConfig(**mb.hf_to_mcore_config(folder), tensor_model_parallel_size=RANKS)
    models = mb.get_mcore_model(config)
    for state in range(first, last):
        with torch.no_grad():
            for parameter in models[0].parameters():
                parameter.fill_(state)
        if rank == 0:
            os.write(pipe, b"begin %d\n" % state)
        config.bridge.save_weights(models, work / "out", max_shard_size="300KB")
        if rank == 0:
            os.write(pipe, b"done %d\n" % state)


def start(*arguments):
    reader, writer = os.pipe()
    pids = []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(reader)
                save_states(rank, *arguments, writer)
                code = 0
            except BaseException as error:
                print(f"rank {rank}: {error}".replace("\n", " ")[:200], flush=True)
            finally:
                os._exit(code)
        pids.append(pid)
    os.close(writer)
    return pids, reader


def held_state(out, names):
    values, found = set(), set()
    files = sorted(out.glob("*.safetensors"))
    for file in files:
        for name, tensor in load_file(file).items():
            found.add(name)
            values.update(tensor.float().unique().tolist())
    assert found == names, f"{len(found)} tensors instead of {len(names)}"
    assert len(values) == 1, f"a mix of states {values}"
    assert len({file.name.split("-of-")[1] for file in files}) == 1, files
    return int(values.pop())


def main():
    folder, work, kills, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    names = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    chance = random.Random(seed)
    out = work / "out"
    state = 1
    leftovers = 0
    for kill in range(kills + 1):
        last_time = kill == kills
        pids, reader = start(folder, work, work / f"store{kill}", state, state + 1 if last_time else state + 10_000)
        done = 0
        if not last_time:
            text = b""
            while b"done" not in text:  # from here on there is an old state
                piece = os.read(reader, 4096)
                assert piece, "the ranks ended before the first save"
                text += piece
            time.sleep(chance.random() * chance.choice([0.02, 0.3]))
            for pid in pids if chance.random() < 0.5 else [chance.choice(pids)]:
                os.kill(pid, signal.SIGKILL)
        else:
            text = b""
        while piece := os.read(reader, 4096):
            text += piece
        codes = [os.waitpid(pid, 0)[1] for pid in pids]
        done = max(int(line.split()[1]) for line in text.split(b"\n") if line.startswith(b"done"))
        leftovers += any(path.name.startswith(".out") for path in work.iterdir())
        held = held_state(out, names)
        assert done <= held <= done + 1, f"state {done} was reported done, the folder holds {held}"
        print(f"kill {kill}: exit codes {codes}, done {done}, held {held}", flush=True)
        assert not last_time or codes == [0, 0]
        state = held + 1
    left = [path.name for path in work.iterdir() if path.name.startswith(".")]
    assert not left, f"left behind: {left}"
    print(f"{kills} kills, {leftovers} of them in the middle of a save: always one whole state", flush=True)


if __name__ == "__main__":
    main()
