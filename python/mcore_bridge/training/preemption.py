"""SIGTERM and SIGUSR1 ask for a checkpoint and an end at the next step's boundary."""

import signal
import threading

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Between install() and restore() the signals only leave a note. A second SIGTERM ends the process as usual."""

    def __init__(self):
        self.received = None
        self._before = {}

    def install(self):
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        self.received = signal.Signals(number).name
        if number == signal.SIGTERM:
            signal.signal(number, self._before.get(number) or signal.SIG_DFL)

    def restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
