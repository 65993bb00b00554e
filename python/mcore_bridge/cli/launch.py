"""One command, several processes: torchrun from environment variables, and the process group of each rank."""

import os
import sys

_TORCHRUN = {
    "NPROC_PER_NODE": "nproc_per_node",
    "NNODES": "nnodes",
    "NODE_RANK": "node_rank",
    "MASTER_ADDR": "master_addr",
    "MASTER_PORT": "master_port",
}


def torchrun_command(argv, environment):
    """The torchrun command line that NPROC_PER_NODE and friends ask for; None when they ask for nothing or we run under it."""
    if "RANK" in environment or not ("NPROC_PER_NODE" in environment or "NNODES" in environment):
        return None
    command = [sys.executable, "-m", "torch.distributed.run"]
    alone = environment.get("NNODES", "1") == "1" and "MASTER_PORT" not in environment
    if alone:
        command.append("--standalone")
    for name, flag in _TORCHRUN.items():
        if name in environment and not (alone and name != "NPROC_PER_NODE"):
            command.append(f"--{flag}={environment[name]}")
    return [*command, "-m", "mcore_bridge", *argv]


def relaunch(argv):
    """Runs torchrun when the environment asks for several processes and returns its exit code; else None."""
    command = torchrun_command(argv, os.environ)
    if command is None:
        return None
    processes = os.environ.get("NPROC_PER_NODE", "1")
    if processes.isdigit() and int(processes) > 1:
        # As many threads as there are cores for each process, or they fight for them.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(processes))))
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(command[3:])
    except ChildFailedError as error:  # the rank itself has said why
        return max(1, error.get_first_failure()[1].exitcode)
    return 0


def init_distributed(timeout_minutes=30):
    """Joins the process group under torchrun (Gloo, and NCCL with GPUs); picks this rank's GPU."""
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if "RANK" in os.environ and not dist.is_initialized():
        from datetime import timedelta

        from .attempt import own_store
        from .failures import watch

        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(minutes=timeout_minutes)
        store, rank, size = own_store(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)

        watch(timeout_minutes)


def finish_distributed():
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        from .failures import unwatch

        dist.barrier()
        unwatch()
        dist.destroy_process_group()
