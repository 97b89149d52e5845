"""Small jobs in the background, such as reading ahead. Nothing depends on them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Jobs:
    """Threads that run jobs, in this process and in those that it forks.

    Args:
        name: prefix of the threads' names.
        threads: how many there are at most.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._name, self._num_threads = name, threads
        self._start()

    def _start(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._threads = ThreadPoolExecutor(self._num_threads, self._name)
        self._pending: set[Future[None]] = set()

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job soon, or never if the threads were stopped. Its errors are dropped."""
        if self._pid != os.getpid():
            self._start()
        with contextlib.suppress(RuntimeError):  # stopped
            future = self._threads.submit(job)
            with self._lock:
                self._pending.add(future)
            future.add_done_callback(self._done)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait for all jobs so far; return False if some are left after ``timeout_s`` seconds."""
        with self._lock:
            pending = list(self._pending)
        return not wait(pending, timeout_s).not_done

    def stop(self) -> None:
        """Drop the jobs that did not begin, and wait for the others."""
        if self._pid == os.getpid():
            self._threads.shutdown(cancel_futures=True)

    def _done(self, future: Future[None]) -> None:
        with self._lock:
            self._pending.discard(future)
