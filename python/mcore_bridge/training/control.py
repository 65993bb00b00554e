"""What all ranks agree on at every step, on a group of its own, so that nothing else ever waits for it."""

import torch
import torch.distributed as dist


class Control:
    """Maxima over all ranks of a few numbers, taken while the step runs: begin() before it, finish() after it."""

    def __init__(self):
        self.size, self.rank, self.group, self._work = 1, 0, None, None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.size, self.rank = dist.get_world_size(), dist.get_rank()
            self.group = dist.new_group(backend="gloo")

    def begin(self, **numbers):
        self._names = list(numbers)
        self._values = torch.tensor([float(value) for value in numbers.values()], dtype=torch.float64)
        self._work = dist.all_reduce(self._values, dist.ReduceOp.MAX, group=self.group, async_op=True) if self.group else None

    def finish(self):
        if self._work is not None:
            self._work.wait()
            self._work = None
        return dict(zip(self._names, self._values.tolist()))

    def gather(self, value):
        """Every rank's object on rank 0 (a list by rank); None elsewhere."""
        if not self.group:
            return [value]
        result = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, result, dst=0, group=self.group)
        return result

    def share(self, value):
        """Rank 0's object on every rank."""
        if not self.group:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, group=self.group)
        return holder[0]


def new_engine_group():
    """A group of all ranks for the engine's own use in the background: (process group, ranks, place), or None for one rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return (dist.new_group(backend="gloo"), list(range(dist.get_world_size())), dist.get_rank())
