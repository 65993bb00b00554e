"""Which samples make global batch i: a function of the seed and the epoch alone, not of the machine."""

import random


class Sampler:
    """`units` samples (or packed rows; None: a stream, of which only share() is asked) in global batches; a rank gets its contiguous share of micro-batches of each.

    The incomplete batch at the end of an epoch is filled from the next epoch's order, so that no sample is dropped; with
    `once` (evaluation) it is filled with None.
    """

    def __init__(self, units, micro_batch_size, global_batch_size, dp_rank, dp_size, seed=42, shuffle=True, once=False):
        if units is not None and units < 1:
            raise ValueError("there is no sample to train on")
        if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % (micro_batch_size * dp_size):
            raise ValueError(
                f"global_batch_size {global_batch_size} must be a multiple of micro_batch_size {micro_batch_size} x {dp_size} data-parallel ranks"
            )
        self.units, self.micro, self.batch, self.rank, self.size = units, micro_batch_size, global_batch_size, dp_rank, dp_size
        self.seed, self.shuffle, self.once = seed, shuffle, once
        self._orders = {}

    def steps(self, epochs):
        """Optimizer steps that `epochs` passes take, at least 1."""
        return max(1, round(epochs * self.units / self.batch))

    def order(self, epoch):
        if epoch not in self._orders:
            order = list(range(self.units))
            if self.shuffle:
                random.Random(f"{self.seed}-{epoch}").shuffle(order)
            self._orders = {key: value for key, value in self._orders.items() if key >= epoch - 1}
            self._orders[epoch] = order
        return self._orders[epoch]

    def global_batch(self, step):
        """Sample indices of the 0-based step."""
        return self.window(step * self.batch)

    def window(self, first):
        """Sample indices of the global batch that begins with the `first`-th sample ever."""
        if self.once:
            return [self.order(0)[at] if at < self.units else None for at in range(first, first + self.batch)]
        return [self.order(position // self.units)[position % self.units] for position in range(first, first + self.batch)]

    def micro_batches(self, step):
        """This rank's micro-batches of the step: lists of sample indices."""
        return self.share(self.global_batch(step))

    def share(self, batch):
        """This rank's micro-batches of a global batch."""
        share = self.batch // self.size
        mine = batch[self.rank * share : (self.rank + 1) * share]
        return [mine[at : at + self.micro] for at in range(0, share, self.micro)]
