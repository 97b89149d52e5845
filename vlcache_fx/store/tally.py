"""Counts of what happened in a store, and one line in the log per kind of trouble."""

from __future__ import annotations

import logging
import threading
from collections import Counter

log = logging.getLogger("vlcache_fx")


class Tally:
    """Counts by the names that ``StoreStats`` has. Safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._logged: set[str] = set()

    def count(self, what: str, number: int = 1) -> None:
        """Add to a count."""
        with self._lock:
            self._counts[what] += number

    def failed(self, kind: str, text: str) -> None:
        """Count a failure; log the first of its kind since ``worked``."""
        with self._lock:
            self._counts["failures"] += 1
            is_first = kind not in self._logged
            self._logged.add(kind)
        if is_first:
            log.warning("vlcache: %s", " ".join(text.split()))

    def worked(self, kind: str) -> None:
        """Log the next failure of this kind again."""
        with self._lock:
            self._logged.discard(kind)

    def counts(self) -> dict[str, int]:
        """Return all counts that are not zero."""
        with self._lock:
            return dict(self._counts)
