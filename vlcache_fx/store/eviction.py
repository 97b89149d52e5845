"""Which entry a full store evicts: the one that is cheapest to lose, by the GreedyDual-Size rule.

An entry's priority is ``clock + cost_ms / nbytes``, set when it is stored or found. The entry of lowest
priority is evicted first, and the clock rises to its priority: so entries that nobody asks for age, whatever
they cost. Of equal priorities the one that was used longest ago goes first. If all entries cost the same per
byte, this is the order of LRU.

``Priorities`` keeps the order in memory. A store with an index of its own, such as an SQL table, uses the
function ``priority`` instead, stores the result and the clock, and selects the lowest row.

Source: Cao and Irani, "Cost-Aware WWW Proxy Caching Algorithms", USITS 1997, section 4.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping

from vlcache_fx.store.base import Eviction
from vlcache_fx.store.entry import Json

COST_MS = "cost_ms"
"""Name in an entry's ``info`` of the measured milliseconds that computing it again would take."""

TYPICAL_MS_PER_BYTE = 1e-5
"""Cost per byte that is assumed where none was measured: between those of a small CPU and of a large GPU."""

_LEAST_COMPACTED = 64
"""Outdated items of a heap that are kept before it is built anew."""


def cost_of(info: Mapping[str, Json]) -> float | None:
    """Return the measured cost in an entry's ``info``, in milliseconds; None without a valid one."""
    cost_ms = info.get(COST_MS)
    if isinstance(cost_ms, bool) or not isinstance(cost_ms, int | float):
        return None
    return float(cost_ms) if math.isfinite(cost_ms) and cost_ms >= 0 else None


def with_cost(info: Mapping[str, Json], cost_ms: float | None) -> dict[str, Json]:
    """Return ``info`` with a measured cost; unchanged if it is None."""
    return dict(info) if cost_ms is None else {**info, COST_MS: round(cost_ms, 3)}


def priority(
    clock: float, cost_ms: float | None, nbytes: int, typical_ms_per_byte: float = TYPICAL_MS_PER_BYTE
) -> float:
    """Return the priority of an entry that is stored or found now; the lowest is evicted first.

    Pure, so that a store with an index on disk can keep priorities and clock there. After an eviction the
    clock must be set to the priority of the evicted entry.

    Args:
        clock: highest priority that was evicted so far; 0.0 at first.
        cost_ms: milliseconds that computing the entry again would take; None if not measured.
        nbytes: bytes of the entry's tensors.
        typical_ms_per_byte: cost per byte of entries without a measured one.
    """
    return clock + (typical_ms_per_byte if cost_ms is None else cost_ms / max(nbytes, 1))


class Priorities:
    """The keys of a store in the order of eviction. Each operation takes O(log n). Not thread-safe.

    Entries without a measured cost count as the mean of those with one.
    """

    def __init__(self) -> None:
        self._clock = 0.0
        self._measured_ms, self._measured_bytes = 0.0, 0  # of all uses so far
        self._turns = itertools.count()
        self._current: dict[str, tuple[float, int, str]] = {}
        self._heap: list[tuple[float, int, str]] = []  # with outdated items, dropped when they are met

    def use(self, key: str, cost_ms: float | None, nbytes: int) -> None:
        """Add a key, or renew it after a hit; see ``priority``."""
        if cost_ms is not None:
            self._measured_ms += cost_ms
            self._measured_bytes += nbytes
        measured = self._measured_bytes
        typical = self._measured_ms / measured if measured else TYPICAL_MS_PER_BYTE
        item = (priority(self._clock, cost_ms, nbytes, typical), next(self._turns), key)
        self._current[key] = item
        heapq.heappush(self._heap, item)
        if len(self._heap) > 2 * len(self._current) + _LEAST_COMPACTED:
            self._heap = sorted(self._current.values())

    def remove(self, key: str) -> None:
        """Remove a key that is dropped for another reason than room; unknown keys are ignored."""
        self._current.pop(key, None)

    def evict(self) -> str:
        """Remove and return the key of lowest priority; the clock rises to that priority.

        Raises:
            LookupError: there is no key.
        """
        while self._heap:
            item = heapq.heappop(self._heap)
            if self._current.get(item[2]) == item:
                del self._current[item[2]]
                self._clock = item[0]
                return item[2]
        raise LookupError("no key is left")

    def __len__(self) -> int:
        return len(self._current)

    def __iter__(self) -> Iterator[str]:
        """Yield the keys, those that are evicted first at the front."""
        return (key for _, _, key in sorted(self._current.values()))


class RecentEvictions:
    """The latest evictions by key, to explain misses. Not thread-safe.

    Args:
        limit: how many are remembered.
    """

    def __init__(self, limit: int = 1024) -> None:
        self._limit = limit
        self._by_key: OrderedDict[str, Eviction] = OrderedDict()

    def add(self, eviction: Eviction) -> None:
        """Remember an eviction; the oldest is forgotten if there are too many."""
        self._by_key[eviction.key] = eviction
        self._by_key.move_to_end(eviction.key)
        if len(self._by_key) > self._limit:
            self._by_key.popitem(last=False)

    def forget(self, key: str) -> None:
        """Forget a key, which is stored again."""
        self._by_key.pop(key, None)

    def get(self, key: str) -> Eviction | None:
        """Return the latest eviction of a key, or None."""
        return self._by_key.get(key)
