"""Batches prepared ahead of the training by threads (tokenizers and tensor copies leave the interpreter to others)."""

import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from ..utils import get_logger


class Loader:
    """Iterates a feed's batches in order; `wait` is how many seconds the last one made the training wait.

    workers 0: nothing runs ahead. Otherwise one thread walks through the feed and `workers` threads build batches, at most
    `workers * prefetch` ahead. pin: in page-locked memory. Call close() at the end."""

    def __init__(self, feed, workers=1, prefetch=2, pin=False):
        self.wait = 0.0
        self._tasks = (lambda task=task: task().pinned() for task in feed) if pin else iter(feed)
        self._pool = None
        if workers > 0:
            self._pool = ThreadPoolExecutor(workers, thread_name_prefix="mcb-loader")
            self._queue = queue.Queue(maxsize=max(1, workers * prefetch))
            self._stop = threading.Event()
            self._walker = threading.Thread(target=self._walk, name="mcb-feed", daemon=True)
            self._walker.start()

    def _walk(self):
        try:
            for task in self._tasks:
                if not self._put(self._pool.submit(task)):
                    return
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever asks for the batch
            failed = Future()
            failed.set_exception(error)
            self._put(failed)

    def _put(self, future):
        while not self._stop.is_set():
            try:
                self._queue.put(future, timeout=0.2)
                return True
            except queue.Full:
                continue
        future.cancel()
        return False

    def __iter__(self):
        return self

    def __next__(self):
        start = time.monotonic()
        batch = next(self._tasks)() if self._pool is None else self._queue.get().result()
        self.wait = time.monotonic() - start
        return batch

    def close(self):
        if self._pool is None:
            return
        self._stop.set()
        while not self._queue.empty():
            self._queue.get_nowait().cancel()
        self._walker.join(timeout=30)
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._walker.is_alive():
            get_logger().warning("the thread that reads the data did not end")
        self._pool = None
