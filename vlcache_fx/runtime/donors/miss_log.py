"""Why spans missed, as far as a call can find out cheaply."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from vlcache_fx.errors import Reason
from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.runtime.donors.differences import distance, reason_of
from vlcache_fx.runtime.donors.recent_keys import MAX_KEYS, Lookup, RecentLookups
from vlcache_fx.store.base import Eviction


@dataclass(frozen=True)
class Miss:
    """Why a key missed in its latest lookup.

    Attributes:
        reason: the reason.
        detail: details for reports; they tell nothing of other salts.
        eviction: why the entry is no longer stored; None if unknown.
    """

    reason: Reason
    detail: str = ""
    eviction: Eviction | None = None


class MissLog:
    """Recent lookups and misses of an engine. Safe to share between threads.

    Bounded, and in memory: a call asks no tier but for the eviction of a key.

    Attributes:
        lookups: the recent lookups.
    """

    def __init__(self) -> None:
        self.lookups = RecentLookups()
        self._misses: OrderedDict[str, Miss] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, key: str, parts: Mapping[str, str]) -> Reason:
        """Record a lookup; return the reason if it is a miss and the store knows no better.

        Lookups with another salt do not count: a report must not tell what other tenants have.
        """
        lookup, was_present = self.lookups.add(key, parts)
        return Reason.NOT_RECORDED if was_present else self._reason(lookup)

    def _reason(self, lookup: Lookup) -> Reason:
        salt = lookup.parts.get("salt")
        others = [other.parts for other in self.lookups.related(lookup) if other.parts.get("salt") == salt]
        if not others:
            return Reason.NEW_ITEM
        return reason_of(lookup.parts, min(others, key=lambda other: distance(lookup.parts, other)))

    def add(self, key: str, miss: Miss) -> None:
        """Record the miss of a key."""
        with self._lock:
            self._misses[key] = miss
            self._misses.move_to_end(key)
            while len(self._misses) > MAX_KEYS:
                self._misses.popitem(last=False)

    def get(self, key: str) -> Miss | None:
        """Return the latest miss of a key; None if it is unknown."""
        return self._misses.get(key)

    def copy(self) -> MissLog:
        """Return a copy that changes on its own."""
        copied = MissLog()
        copied.lookups = self.lookups.copy()
        with self._lock:
            copied._misses = self._misses.copy()
        return copied

    def clear(self, selection: Selection | None = None) -> None:
        """Remove the lookups and misses of selected keys, by default all."""
        self.lookups.clear(selection)
        with self._lock:
            for key in [key for key in self._misses if selection is None or selection.matches(key)]:
                del self._misses[key]


def with_eviction(reason: Reason, eviction: Eviction | None) -> Miss:
    """Return the miss of a key, given why its entry is no longer stored."""
    if eviction is None:
        return Miss(reason)
    tier = f"{eviction.tier} tier"
    match eviction.cause:
        case "capacity":
            return Miss(Reason.EVICTED, tier, eviction)
        case "damaged":
            return Miss(Reason.DAMAGED_ENTRY, tier, eviction)
    return Miss(reason, "", eviction)  # cleared: to calls it is as if it had never been there
