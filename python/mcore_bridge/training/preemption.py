"""SIGTERM and SIGUSR1 ask for a checkpoint and an end at the next step's boundary."""

import signal

from ..engine import _core

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Between install() and restore() the signals only leave a note. A second SIGTERM ends the process at once; the first does
    when not all ranks are left to reach the end of the step (cli/failures.py)."""

    def install(self):
        _core.watch_signals([int(number) for number in SIGNALS])
        return self

    @property
    def received(self):
        """The signal's name, or None."""
        number = _core.caught_signal()
        return signal.Signals(number).name if number else None

    def restore(self):
        _core.unwatch_signals()
