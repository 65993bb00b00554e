"""All ranks end together, and the screen shows why first. What ranks tell each other then goes through the store that the
process group was made with: it works when the groups do not."""

import json
import os
import re
import signal
import sys
import threading
import time

from ..utils import get_logger

# How long the other ranks leave the word to rank 0 (most mistakes are seen by every rank), and how long a rank that sees
# another one fail waits for the same news to reach it as an error of its own.
SECONDS_TO_RANK_ZERO = 2.0
SECONDS_OF_GRACE = 10.0
SECONDS_TO_ANSWER = 4.0
# How long a rank that was asked to end by a signal waits for a sign of life of all others.
SECONDS_OF_ROLL_CALL = 8.0
FAILURE, WANTED, FLIGHT = "mcore-bridge/failure", "mcore-bridge/flight-wanted", "mcore-bridge/flight/{}"
ROLL_CALL, PRESENT = "mcore-bridge/roll-call", "mcore-bridge/present"

_sentinel = None


def _rank():
    return int(os.environ.get("RANK", 0))


class Sentinel(threading.Thread):
    """Ends this process when another rank has failed, and tells, when asked, which collective operations this rank is in. After
    a signal that asks for an end (training/preemption.py) it sees to it that the end comes: a rank whose peer is gone never gets
    to the end of its step."""

    def __init__(self, store, timeout_seconds):
        super().__init__(name="mcb-sentinel", daemon=True)
        self.store, self.timeout = store, timeout_seconds
        self.stop, self.failing = threading.Event(), False
        self._noticed = self._warned = self._called = None
        self._answered = False
        # One server answers all ranks.
        self.interval = min(5.0, 0.5 + int(os.environ.get("WORLD_SIZE", 1)) / 500)

    def run(self):
        while not self.stop.wait(self.interval):
            try:
                self._look()
            except Exception as error:  # noqa: BLE001 - the store is gone: the agent ended, or is about to end us
                get_logger().debug(f"sentinel: {error}")
                self._store_is_gone()
                return

    def _look(self):
        if self.store.check([WANTED]):
            self.publish()
        elif _longest_wait(_records()) > 0.9 * self.timeout and not self._warned:
            self._warned = True
            self.store.set(WANTED, "1")
        self._roll_call()
        if self.failing or not self.store.check([FAILURE]):
            return
        self._noticed = self._noticed or time.monotonic()
        if time.monotonic() - self._noticed > SECONDS_OF_GRACE and not self.failing:
            sys.stdout.flush()
            os._exit(1)

    def _roll_call(self):
        """A process that lives answers, whatever its main thread does."""
        asked = _signal()
        if asked and self._called is None:
            self._called = time.monotonic()
            self.store.set(ROLL_CALL, "1")
        if not self._answered and self.store.check([ROLL_CALL]):
            self._answered = True
            self.store.add(PRESENT, 1)
        if asked and time.monotonic() - self._called > SECONDS_OF_ROLL_CALL + 2 * self.interval:
            size = int(os.environ.get("WORLD_SIZE", 1))
            present = self.store.add(PRESENT, 0)
            if present < size:
                _end_by(asked, f"{size - present} of {size} ranks are gone")
            self._called = float("inf")  # all are there: the step will end

    def _store_is_gone(self):
        """Rank 0 or torchrun has ended: nobody is left to agree with on a checkpoint."""
        while not self.stop.wait(self.interval):
            if asked := _signal():
                _end_by(asked, "the process that keeps the ranks' store is gone")

    def publish(self):
        self.store.set(FLIGHT.format(_rank()), json.dumps(_records()))

    def claim(self, text):
        """What the first rank that failed said: `text` itself when this is the first."""
        self.failing = True
        return self.store.compare_set(FAILURE, "", text).decode()

    def flights(self, ranks):
        """The operations of other ranks, by rank; one that does not answer is left out."""
        self.store.set(WANTED, "1")
        self.publish()
        end = time.monotonic() + SECONDS_TO_ANSWER + 2 * self.interval
        found = {}
        while time.monotonic() < end and len(found) < len(ranks):
            for rank in ranks:
                if rank not in found and self.store.check([FLIGHT.format(rank)]):
                    found[rank] = json.loads(self.store.get(FLIGHT.format(rank)))
            time.sleep(0.2)
        return found


def _signal():
    from ..engine import _core

    return _core.caught_signal()


def _end_by(number, why):
    """Ends this process with the exit code that shells give a signal."""
    name = signal.Signals(number).name
    print(f"mcore-bridge: rank {_rank()}: ended by {name} without a checkpoint: {why}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(128 + number)


def watch(timeout_minutes):
    """Starts the sentinel of this rank. The process group must exist."""
    global _sentinel
    from torch.distributed import distributed_c10d

    store = distributed_c10d._get_default_store()
    _sentinel = Sentinel(store.clone() if hasattr(store, "clone") else store, 60 * timeout_minutes)
    _sentinel.start()


def unwatch():
    global _sentinel
    if _sentinel is not None:
        _sentinel.stop.set()
        _sentinel.join(timeout=5)
        _sentinel = None


def _records():
    from ..engine import _core

    return json.loads(_core.flight_records())


def _longest_wait(records):
    return max((op["age"] for group in records for op in group["operations"] if op["seconds"] is None), default=0.0)


def _last(records, group, ranks):
    """(number, operation) of the last operation a rank began in a group; (0, None) when there is none."""
    for entry in records:
        if entry["group"] == group and entry["ranks"] == ranks:
            return entry["operations"][-1]["number"], entry["operations"][-1]
    return 0, None


def missing_ranks(own, others):
    """For every operation this rank waits in, which ranks of its group never came to it and what they did last. `own`: this
    rank's records; `others`: the records of the ranks that answered, by rank."""
    lines = []
    for entry in own:
        waiting = [op for op in entry["operations"] if op["seconds"] is None]
        if not waiting:
            continue
        op = waiting[-1]
        lines.append(
            f"waited {op['age']:.0f} s in {op['operation']} {op['shape']} (number {op['number']}) of group {entry['group']} "
            f"of ranks {', '.join(map(str, entry['ranks']))}"
        )
        for rank in entry["ranks"]:
            if rank == _rank():
                continue
            if rank not in others:
                lines.append(f"  rank {rank} does not answer: it has ended, or hangs outside of the engine")
                continue
            number, last = _last(others[rank], entry["group"], entry["ranks"])
            if number < op["number"]:
                before = (
                    f"its last was {last['operation']} (number {number}), {last['age']:.0f} s ago"
                    if last
                    else "it began none there"
                )
                lines.append(f"  rank {rank} never came: {before}{_elsewhere(others[rank], entry)}")
    return lines


def _elsewhere(records, entry):
    for other in records:
        waiting = [op for op in other["operations"] if op["seconds"] is None]
        if waiting and (other["group"], other["ranks"]) != (entry["group"], entry["ranks"]):
            return f"; it waits in {waiting[-1]['operation']} (number {waiting[-1]['number']}) of group {other['group']}"
    return ""


def _explain(text):
    """The error's text; of a collective that did not end, with the ranks that are missing."""
    if _sentinel is None or not re.search(r"[Tt]imed? ?out|timeout", text):
        return text
    try:
        own = _records()
        ranks = sorted({rank for entry in own for rank in entry["ranks"]} - {_rank()})
        return "\n".join([text, *missing_ranks(own, _sentinel.flights(ranks))])
    except Exception as error:  # noqa: BLE001 - the explanation must not hide the failure
        return f"{text} (which ranks are missing cannot be said: {error})"


def fail(error):
    """Shows the cause and ends this process at once: a rank that lingers in a destructor would keep the others waiting. The
    first rank that fails speaks, the others are silent; returns 1 outside of torchrun."""
    rank = _rank()
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    if _sentinel is not None:
        _sentinel.failing = True
    text = _explain(text)
    if rank:
        time.sleep(SECONDS_TO_RANK_ZERO)
    prefix = f"rank {rank}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    mine = f"{prefix}error: {text}"
    first = mine
    if _sentinel is not None:
        try:
            first = _sentinel.claim(mine)
        except Exception:  # noqa: BLE001 - the store is gone with the agent: say it anyway
            first = mine
    if first == mine:
        print(f"mcore-bridge: {mine}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        sys.stdout.flush()
        os._exit(1)
    return 1
