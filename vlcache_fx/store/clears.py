"""The latest calls of ``clear``: a request that began before one does not store what it dropped."""

from __future__ import annotations

import threading
from collections import deque

from vlcache_fx.keys.entry_key import Selection

MAX_CLEARS = 64


class Clears:
    """The last calls of ``clear``. Safe to share between threads.

    Args:
        limit: how many are remembered.
    """

    def __init__(self, limit: int = MAX_CLEARS) -> None:
        self._number = 0
        self._latest: deque[Selection | None] = deque(maxlen=limit)
        self._lock = threading.Lock()

    @property
    def number(self) -> int:
        """The number of calls so far: requests note it when they begin."""
        return self._number

    def add(self, selection: Selection | None) -> None:
        """Add a call, before the store drops entries; None for all entries."""
        with self._lock:
            self._number += 1
            self._latest.append(selection)

    def covers(self, key: str, since: int) -> bool:
        """Return True if a call after number ``since`` dropped the key; also if calls were forgotten."""
        if since == self._number:
            return False
        with self._lock:
            calls = self._number - since
            latest = list(self._latest)[-calls:]
        return calls > len(latest) or any(one is None or one.matches(key) for one in latest)
