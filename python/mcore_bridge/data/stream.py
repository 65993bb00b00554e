"""Data that is read while training: rows in chunks, from files or the hub, without ever holding all of them.

A chunk is `shuffle_buffer_size` consecutive rows, shuffled among themselves and packed among themselves. Where a stream stands
is therefore a few numbers (which row of each source the chunk begins with, and how many of its units are used up), and what
follows is a function of them and the seed: a run that goes on meets the same rows whatever the number of ranks or workers."""

import itertools
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from .dataset import local_files, parse_line, split_source
from .interleave import draws


def start_position(sources):
    """Where a stream begins. `rows`: rows taken from each source since it (re)started; `exhausted`: sources that ran out once."""
    return {"epoch": 0, "drawn": 0, "rows": [0] * sources, "exhausted": [False] * sources}


class Source:
    """The rows of one dataset from any row on."""

    def __init__(self, source):
        self.name, self.count = split_source(source)
        self.files = local_files(self.name)

    def rows(self, start):
        """(index, row) from row `start` on."""
        rows = itertools.islice(self._all(start), self.count and max(0, self.count - start))
        return zip(itertools.count(start), rows)

    def _all(self, start):
        if self.files is not None and all(path.endswith((".jsonl", ".txt")) for path in self.files):
            return self._lines(start)
        from datasets import load_dataset

        if self.files is not None:
            kinds = {path.rsplit(".", 1)[1] for path in self.files}
            if len(kinds) > 1:
                raise ValueError(
                    f"dataset '{self.name}': a streamed folder holds files of one kind, found {', '.join(sorted(kinds))}"
                )
            kind = kinds.pop().replace("jsonl", "json")
            rows = load_dataset(kind, data_files=self.files, split="train", streaming=True)
        else:
            path, _, subset = self.name.partition(":")
            try:
                rows = load_dataset(path, subset or None, split="train", streaming=True)
            except Exception as error:
                raise FileNotFoundError(
                    f"dataset '{self.name}' is neither a file here nor a hub dataset that opens: {error}"
                ) from None
        return iter(rows.skip(start))

    def _lines(self, start):
        for path in self.files:
            with open(path, encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    if start:
                        start -= 1
                    elif path.endswith(".txt"):
                        yield {"text": line.rstrip("\n")}
                    else:
                        yield parse_line(line, path, number)


class Stream:
    """Chunks of (source name, index, row), each with the position of the next one."""

    def __init__(self, sources, seed, chunk_rows, shuffle=True, probabilities=None, strategy="first_exhausted"):
        if chunk_rows < 1:
            raise ValueError(f"shuffle_buffer_size {chunk_rows} must be at least 1")
        self.sources = [Source(source) for source in sources]
        self.seed, self.chunk_rows, self.shuffle = seed, chunk_rows, shuffle
        self.probabilities, self.strategy = probabilities, strategy
        self._open = {}  # source index -> (next row, iterator), so that chunks in order read on

    def chunk(self, position):
        """(rows, position of the next chunk)."""
        state = {**position, "rows": list(position["rows"]), "exhausted": list(position["exhausted"])}
        picked = []
        ended = self._mixed(state, picked) if self.probabilities else self._in_turn(state, picked)
        if not picked and ended and position["drawn"] == 0:
            raise ValueError(f"dataset {', '.join(source.name for source in self.sources)}: there are no rows")
        if self.shuffle:
            random.Random(f"{self.seed}-{position['epoch']}-{position['drawn']}").shuffle(picked)
        if ended:
            state = {**start_position(len(self.sources)), "epoch": position["epoch"] + 1}
            self._open.clear()
        return picked, state

    def _next(self, which, state):
        """The next row of a source, or None at its end."""
        at = state["rows"][which]
        if self._open.get(which, (None,))[0] != at:
            self._open[which] = (at, self.sources[which].rows(at))
        rows = self._open[which][1]
        item = next(rows, None)
        if item is None:
            return None
        state["rows"][which] += 1
        state["drawn"] += 1
        self._open[which] = (at + 1, rows)
        return (self.sources[which].name, *item)

    def _in_turn(self, state, picked):
        """One source after the other. Fills `picked`; True at the end of the epoch."""
        for which in range(len(self.sources)):
            while not state["exhausted"][which]:
                if len(picked) == self.chunk_rows:
                    return False
                row = self._next(which, state)
                state["exhausted"][which] = row is None
                if row is not None:
                    picked.append(row)
        return True

    def _mixed(self, state, picked):
        """By the draws of the epoch. A source has run out when a row beyond its last is drawn."""
        for which in draws(self.probabilities, f"{self.seed}-{state['epoch']}-interleave", state["drawn"]):
            if len(picked) == self.chunk_rows:
                return False
            row = self._next(which, state)
            if row is None:
                state["exhausted"][which] = True
                if self.strategy == "first_exhausted" or all(state["exhausted"]):
                    return True
                state["rows"][which] = 0
                row = self._next(which, state)
                if row is None:
                    raise ValueError(f"dataset '{self.sources[which].name}' is empty")
            picked.append(row)


class Encoders:
    """Processes that tokenise rows, kept for the whole run; none with `processes` 1."""

    def __init__(self, processes):
        # Not forked: this process has threads, and a fork would keep their locks.
        self.pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn")) if processes > 1 else None

    def map(self, work, rows):
        return list(self.pool.map(work, rows, chunksize=64)) if self.pool else list(map(work, rows))

    def close(self):
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)
