"""Logging, seeds and small helpers."""

import logging
import os
import random

_LOGGED_ONCE = set()


def get_dist_setting():
    """(rank, local_rank, world_size, local_world_size) from torchrun's environment; -1, -1, 1, 1 without it."""
    env = os.environ
    return (
        int(env.get("RANK", -1)),
        int(env.get("LOCAL_RANK", -1)),
        int(env.get("WORLD_SIZE", 1)),
        int(env.get("LOCAL_WORLD_SIZE", 1)),
    )


def is_master():
    return get_dist_setting()[0] in (-1, 0)


def is_local_master():
    return get_dist_setting()[1] in (-1, 0)


def is_last_rank():
    rank, _, world_size, _ = get_dist_setting()
    return rank in (-1, world_size - 1)


def get_logger(log_level=None):
    """The logger `mcore_bridge`: level from LOG_LEVEL (INFO) on local rank 0, ERROR elsewhere; has info_once, warning_once."""
    logger = logging.getLogger("mcore_bridge")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(levelname)s:%(name)s] %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
        level = log_level or os.environ.get("LOG_LEVEL", "INFO").upper()
        logger.setLevel(level if is_local_master() else logging.ERROR)

        def once(log):
            def emit(message, *args):
                if message not in _LOGGED_ONCE:
                    _LOGGED_ONCE.add(message)
                    log(message, *args)

            return emit

        logger.info_once = once(logger.info)
        logger.warning_once = once(logger.warning)
    elif log_level is not None:
        logger.setLevel(log_level)
    return logger


def set_random_seed(
    seed_,
    data_parallel_random_init=False,
    te_rng_tracker=False,
    inference_rng_tracker=False,
    use_cudagraphable_rng=False,
):
    """Seeds Python, NumPy and torch with seed + 1009 * pipeline rank (+ 11 * data rank with data_parallel_random_init).

    The last three arguments choose between Megatron's CUDA generators and have no effect here.
    """
    import torch

    from .engine import _core
    from .parallel_state import get_parallel_state

    if seed_ is None or seed_ <= 0:
        raise ValueError(f"set_random_seed: seed must be a positive integer, got {seed_}")
    state = get_parallel_state()
    seed = seed_ + 1009 * state.pp_rank + (11 * state.dp_rank if data_parallel_random_init else 0)
    random.seed(seed)
    try:
        import numpy

        numpy.random.seed(seed % 2**32)
    except ImportError:
        pass
    if torch.cuda.is_available():
        torch.cuda.init()  # before, torch puts the GPUs' seeds off until Python first uses one, which the engine never waits for
    torch.manual_seed(seed)
    _core.reset_random_streams()
