"""What watches the loss: NaN and Inf, spikes, and a record of the data that caused them."""

import json
import math
import statistics
from collections import deque
from pathlib import Path

WINDOW = 64
ENOUGH = 16  # losses before a spike can be told from noise
# Of a normal distribution the median of |x - median| is this share of the standard deviation.
MAD_OF_NORMAL = 0.6745


class SpikeDetector:
    """Robust z-score of a loss among the recent ones: 0.6745 (x - median) / MAD (Iglewicz and Hoaglin, 1993). The MAD is taken
    as at least 1 % of the median, so that a loss that hardly moves does not make noise a spike."""

    def __init__(self, threshold, recent=()):
        self.threshold = threshold
        self.recent = deque(recent, maxlen=WINDOW)

    def _middle(self):
        """(median, robust standard deviation) of the recent losses; None when they are too few."""
        if len(self.recent) < ENOUGH:
            return None
        middle = statistics.median(self.recent)
        spread = max(statistics.median(abs(value - middle) for value in self.recent), 0.01 * abs(middle), 1e-12)
        return middle, spread / MAD_OF_NORMAL

    def limit(self):
        """The largest loss that would be no spike."""
        known = self._middle()
        return known[0] + self.threshold * known[1] if known and self.threshold > 0 else math.inf

    def is_spike(self, loss):
        """(whether, score) of a loss, which then counts as recent: a level that stays is no spike for long."""
        known, spike = self._middle(), loss > self.limit()
        self.recent.append(loss)
        return spike, (loss - known[0]) / known[1] if known else 0.0


class BadBatches:
    """<output_dir>/bad_batches.jsonl: one line per bad step, with the rows of its whole global batch."""

    def __init__(self, output_dir, parallel, control):
        self.path, self.control = Path(output_dir) / "bad_batches.jsonl", control
        # Ranks of one data-parallel replica hold the same rows.
        self.speaks = parallel.tp_rank == 0 and parallel.cp_rank == 0 and parallel.pp_rank == 0

    def record(self, iteration, reason, rows, **more):
        """Collective. Returns the number of rows."""
        everywhere = self.control.gather(rows if self.speaks else [])
        if everywhere is None:
            return 0
        rows = [row for some in everywhere for row in some]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": iteration, "reason": reason, **more, "rows": rows}) + "\n")
        return len(rows)
