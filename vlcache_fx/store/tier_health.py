"""Counts of a list of tiers, and what a failure of one costs: what it has, never the request."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from vlcache_fx.errors import StoreClosedError, StoreError
from vlcache_fx.store.base import Store, StoreStats

log = logging.getLogger("vlcache_fx")

OF_TIERS = ("promotions", "write_downs", "failures")
"""Counts that are kept per tier."""

SUMS = ("entries", "used_bytes", "capacity_bytes", "evictions", "removals", *OF_TIERS, "damaged")
OWN = ("hits", "misses", "admissions", "rejections")


class TierHealth:
    """Counts events and failures of tiers. Safe in threads.

    Args:
        tiers: the tiers, fastest first.

    Attributes:
        capacities: their bounds in bytes.
    """

    def __init__(self, tiers: Sequence[Store]) -> None:
        self._tiers = tuple(tiers)
        self.capacities = [tier.stats().capacity_bytes for tier in tiers]
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._logged: dict[tuple[int, str], set[str]] = {}  # kinds of errors, by tier and operation
        self._closed = False

    def count(self, event: str, index: int | None = None) -> None:
        """Count an event, of a tier or of all."""
        with self._lock:
            self._counts[event if index is None else f"{event} {index}"] += 1

    def close(self) -> None:
        """From now on closed tiers are no failures."""
        self._closed = True

    @contextmanager
    def tolerating(self, index: int, doing: str, *, everything: bool = False) -> Iterator[None]:
        """Count a failure of a tier in the body; log the first of its kind since the operation worked.

        Args:
            index: index of the tier.
            doing: the operation, in a word, such as ``read``.
            everything: tolerate all exceptions, for a thread that must go on. Otherwise only those that
                stores may raise.
        """
        try:
            yield
        except Exception as error:
            if not everything and not isinstance(error, StoreError | OSError):
                raise
            if self._closed and isinstance(error, StoreClosedError):
                return
            self.count("failures", index)
            kind = type(error).__name__
            with self._lock:
                logged = self._logged.setdefault((index, doing), set())
                is_new = kind not in logged
                logged.add(kind)
            if is_new:
                tier, text = self._tiers[index].tier, f"{doing}, {kind}"
                log.warning("vlcache: the %s tier failed (%s), going on without: %s", tier, text, error)
        else:
            with self._lock:
                self._logged.pop((index, doing), None)

    def stats(self, queue_drops: int) -> StoreStats:
        """Return the stats of all tiers as one. Sizes are sums: an entry in two tiers counts twice.

        Failures are those that tiers count themselves, and those that they raised.
        """
        parts = []
        for index, tier in enumerate(self._tiers):
            part = StoreStats(0, 0, self.capacities[index], tier=tier.tier)
            with self.tolerating(index, "stats"):
                part = tier.stats()
            added = {name: getattr(part, name) + self._counts[f"{name} {index}"] for name in OF_TIERS}
            parts.append(replace(part, **added))
        return StoreStats(
            **{name: sum(getattr(part, name) for part in parts) for name in SUMS},
            **{name: self._counts[name] for name in OWN},
            queue_drops=queue_drops,
            tier=", ".join(part.tier for part in parts),
            tiers=tuple(parts),
        )
