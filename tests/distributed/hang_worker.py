"""Ranks that leave the others waiting: `hang_worker.py SCENARIO`. Ends through the command line's fail()."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "python"))
import mcore_bridge as mb  # noqa: E402
from mcore_bridge.cli.failures import fail, watch  # noqa: E402

SECONDS = 6


def main():
    scenario = sys.argv[1]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    watch(SECONDS / 60)
    mb.initialize_model_parallel(tensor_model_parallel_size=3, distributed_timeout_minutes=SECONDS / 60)
    rank = dist.get_rank()
    try:
        folder = sys.argv[2]
        config = mb.ModelConfig(**mb.hf_to_mcore_config(folder), tensor_model_parallel_size=3)
        models = mb.get_mcore_model(config)
        config.bridge.load_weights(models, folder)
        ids = torch.arange(3, 11)[None]
        mb.forward_logits(models, ids)
        if rank == 1 and scenario == "hang":
            time.sleep(60)
        if rank == 1 and scenario == "throw":
            raise ValueError("something only rank 1 sees")
        mb.forward_logits(models, ids)
    except Exception as error:  # noqa: BLE001 - as the command line does
        fail(error)
    os._exit(0)


if __name__ == "__main__":
    main()
