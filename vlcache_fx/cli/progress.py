"""What is compiling, and for how long: a line that changes on a terminal, lines of a log elsewhere."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from vlcache_fx.log_output import apply_log_variable

COMPILING = re.compile(r"vlcache: compiling (.+)$")
ENDED = ("vlcache: compiled ", "vlcache: loaded ")
REFRESH_S = 0.5
LOG = logging.getLogger("vlcache_fx")


@contextmanager
def showing_progress(what: str) -> Iterator[None]:
    """Show the package's log on stderr in the body; on a terminal, one line instead for compilations.

    Args:
        what: what the body does, such as ``starting``.
    """
    if apply_log_variable():  # it goes there already, from the level that the user chose
        yield
        return
    console = Console(stderr=True)
    handler: logging.Handler = _Line(console, what) if console.is_terminal else logging.StreamHandler()
    level = LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        LOG.setLevel(level)
        LOG.removeHandler(handler)
        handler.close()


class _Line(logging.Handler):
    """A line with a clock on a terminal; other messages scroll above it."""

    def __init__(self, console: Console, what: str) -> None:
        super().__init__(logging.INFO)
        self._console, self._what, self._count = console, what, 0
        self._program, self._begin = "", time.perf_counter()
        self._is_done = threading.Event()
        self._status = console.status(what)
        self._status.start()
        self._thread = threading.Thread(target=self._refresh, name="vlcache-progress", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message."""
        text = record.getMessage()
        found = COMPILING.match(text)
        if found is not None:
            self._program, self._count = found[1], self._count + 1
        elif not text.startswith(ENDED):
            self._console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Take the line away."""
        self._is_done.set()
        self._thread.join()
        self._status.stop()
        super().close()

    def _refresh(self) -> None:
        while not self._is_done.wait(REFRESH_S):
            elapsed_s = time.perf_counter() - self._begin
            now = f": program {self._count}, {self._program}" if self._program else ""
            self._status.update(f"{self._what} ({elapsed_s:.0f} s{now})")
