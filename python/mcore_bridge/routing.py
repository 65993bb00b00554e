"""Which experts the routers choose: recorded, and given back to be chosen again (router replay).

Choices are a list with one entry per layer with experts of this rank's chunks, each a list with one int64 tensor [tokens, k] per
forward (recomputed forwards do not count), where `tokens` are those of this rank: [sequence, batch] flattened."""

import contextlib

from .model import engines


@contextlib.contextmanager
def record_routing(models):
    """`with record_routing(models) as choices:` fills `choices` when the block ends."""
    chunks, choices = engines(models), []
    for chunk in chunks:
        chunk.record_routing()
    try:
        yield choices
    finally:
        for chunk in chunks:
            choices.extend(chunk.recorded_routing())


@contextlib.contextmanager
def replay_routing(models, choices):
    """Inside the block the routers choose what `choices` says, forward by forward; weights still come from their scores.
    ValueError when a choice does not fit the forward it is used in, or there are fewer choices than forwards."""
    chunks, choices = engines(models), list(choices)
    needed = sum(chunk.num_routers for chunk in chunks)
    if len(choices) != needed:
        raise ValueError(f"replay_routing: choices of {len(choices)} layers were given, the model has {needed} with experts")
    for chunk in chunks:
        chunk.replay_routing([choices.pop(0) for _ in range(chunk.num_routers)])
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.replay_routing([[] for _ in range(chunk.num_routers)])
