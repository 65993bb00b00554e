"""What watches the loss: NaN and Inf, spikes, and a record of the data that caused them."""

import json
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

    def score(self, loss):
        """The score of a loss, which then counts as recent."""
        score = 0.0
        if len(self.recent) >= ENOUGH:
            middle = statistics.median(self.recent)
            spread = max(statistics.median(abs(value - middle) for value in self.recent), 0.01 * abs(middle), 1e-12)
            score = MAD_OF_NORMAL * (loss - middle) / spread
        self.recent.append(loss)
        return score

    def is_spike(self, loss):
        score = self.score(loss)
        return self.threshold > 0 and score > self.threshold, score


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
