"""Work for times without requests: one thread, a bounded share of the time, interrupted by requests."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from vlcache_fx.errors import VlcacheError
from vlcache_fx.runtime.programs.lowered import ProgramInterruptedError, between_steps

log = logging.getLogger("vlcache_fx")

QUIET_S = 0.25
"""How long no request may have run before work begins: between two tokens of an answer it must not."""

MAX_WORK = 8
"""Pieces of work that are kept; of more, the latest."""

MAX_ATTEMPTS = 20
"""ProgramInterruptedError work begins anew; after so many attempts it is dropped."""

Work = Callable[[], None]


class IdleTime:
    """Runs work while no request runs. Safe to share between threads.

    The thread begins with the first work, and ends with ``close``.

    Args:
        share: share of idle time that is used, in [0, 1]; with 0 nothing runs.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._work: OrderedDict[str, tuple[Work, int]] = OrderedDict()
        self._running, self._last_s = 0, 0.0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def request(self) -> AbstractContextManager[None]:
        """Tell that a request runs in the body: work that runs is interrupted, none begins."""
        return self._request() if self.share else nullcontext()  # decoding steps call this, too

    @contextmanager
    def _request(self) -> Iterator[None]:
        with self._changed:
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._last_s = time.monotonic()

    def offer(self, name: str, work: Work) -> None:
        """Run work some time, unless later work of the same name replaces it."""
        with self._changed:
            if self._closed or not self.share:
                return
            self._work.pop(name, None)
            self._work[name] = work, 0
            while len(self._work) > MAX_WORK:
                self._work.popitem(last=False)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="vlcache-idle", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Wait until all work is done; return False if it is not in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._work, timeout_s)

    def close(self) -> None:
        """Drop all work; what runs is interrupted, and the thread ends."""
        with self._changed:
            self._closed = True
            self._work.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=60)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._work or self._quiet_in_s() > 0):
                    self._changed.wait(max(self._quiet_in_s(), 0.01) if self._work else None)
                if self._closed:
                    return
                name, (work, attempts) = next(iter(self._work.items()))
            start_s = time.monotonic()
            is_done = self._try(work) or attempts + 1 >= MAX_ATTEMPTS
            used_s = time.monotonic() - start_s
            with self._changed:
                if self._work.get(name, (None, 0))[0] is work:  # else later work has replaced it
                    if is_done:
                        del self._work[name]
                    else:
                        self._work[name] = work, attempts + 1
                self._changed.notify_all()
                rest_s = used_s * (1 / self.share - 1)
                self._changed.wait_for(lambda: self._closed, rest_s)

    def _try(self, work: Work) -> bool:
        """Do work; return False if a request interrupted it."""
        try:
            with between_steps(self._check):
                work()
        except ProgramInterruptedError:
            return False
        except (VlcacheError, RuntimeError) as error:
            log.warning("vlcache: work in idle time failed: %s: %s", type(error).__name__, error)
        return True

    def _check(self) -> None:
        if self._running or self._closed:
            raise ProgramInterruptedError

    def _quiet_in_s(self) -> float:
        """Seconds until no request has run for ``QUIET_S``, if none begins."""
        return QUIET_S if self._running else self._last_s + QUIET_S - time.monotonic()
