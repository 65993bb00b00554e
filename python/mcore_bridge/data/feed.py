"""What each step trains on, and where the data stands after it. A feed yields tasks: calls that build the micro-batches of one
global batch; a loader runs them ahead of the training."""

import zlib
from dataclasses import dataclass, field, replace

from .batching import pinned
from .stream import start_position


@dataclass
class Batch:
    """This rank's share of a global batch."""

    micro_batches: list
    rows: list  # of the share: {"source", "row", "id"} of every sample
    position: dict = field(default_factory=dict)  # where the data stands behind the whole global batch

    def pinned(self):
        return replace(self, micro_batches=[pinned(each) for each in self.micro_batches])


class MapFeed:
    """Batches of data in memory. Its position is the number of units (over all ranks) that are used up."""

    def __init__(self, units, sampler, position=None):
        self.units, self.sampler = units, sampler
        self.fingerprint = {"units": len(units), "tokens": units.tokens, "crc32": units.checksum()}
        position = position or {"samples": 0}
        if "samples" not in position:
            raise ValueError(
                "resume: the checkpoint's data was streamed; pass --streaming true, or --finetune true to begin anew"
            )
        known = position.get("fingerprint")
        if known and known != self.fingerprint:
            raise ValueError(
                f"resume: the training data is not what the checkpoint was trained on ({known} then, {self.fingerprint} now); "
                "use the same dataset, template and length flags, or --finetune true to begin anew with these data"
            )
        self.first = position["samples"]

    def __iter__(self):
        first, size = self.first, self.sampler.batch
        while True:
            yield lambda first=first: self._batch(first)
            first += size

    def _batch(self, first):
        shares = self.sampler.share(self.sampler.window(first))
        rows = [row for share in shares for row in self.units.row_ids(share)]
        position = {"samples": first + self.sampler.batch, "fingerprint": self.fingerprint}
        return Batch([self.units.micro_batch(share) for share in shares], rows, position)


class StreamFeed:
    """Batches of streamed data. Every rank reads and encodes the whole stream and keeps its share: that is what makes a batch
    the same for any number of ranks."""

    def __init__(self, stream, make_units, sampler, position=None):
        self.stream, self.make_units, self.sampler = stream, make_units, sampler
        position = position or {"chunk": start_position(len(stream.sources)), "unit": 0, "samples": 0}
        if "chunk" not in position:
            raise ValueError(
                "resume: the checkpoint's data was not streamed; leave --streaming out, or pass --finetune true to begin anew"
            )
        if len(position["chunk"]["rows"]) != len(stream.sources):
            raise ValueError(
                "resume: the checkpoint was trained on another number of datasets; pass --finetune true to begin anew"
            )
        self.position = position

    def _chunks(self, position):
        fruitful = position["epoch"]  # the last epoch that gave anything
        while True:
            rows, following = self.stream.chunk(position)
            units = self.make_units(rows)
            if units is not None:
                fruitful = position["epoch"]
                yield position, units
            elif position["epoch"] > fruitful + 1:
                raise ValueError("the streamed data hold no row that can be used")
            position = following

    def __iter__(self):
        skip, samples = self.position["unit"], self.position["samples"]
        batch = []  # (units, index) of the global batch in the making
        for position, units in self._chunks(self.position["chunk"]):
            for unit in range(skip, len(units)):
                batch.append((units, unit))
                if len(batch) == self.sampler.batch:
                    samples += len(batch)
                    after = {"chunk": position, "unit": unit + 1, "samples": samples}
                    yield lambda batch=batch, after=after: self._batch(batch, after)
                    batch = []
            skip = 0

    def _batch(self, batch, after):
        shares = self.sampler.share(batch)
        rows = [row for share in shares for units, unit in share for row in units.row_ids([unit])]
        return Batch(
            [share[0][0].build([s for units, unit in share for s in units.samples_of(unit)]) for share in shares], rows, after
        )


def checksum_of(lengths):
    return zlib.crc32(b"".join(int(length).to_bytes(4, "little") for length in lengths))
