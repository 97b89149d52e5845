"""A store in the memory of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from vlcache_fx.errors import StoreClosedError, StoreError
from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.store.base import EntryInfo, Eviction, OnEvict, Store, StoreStats
from vlcache_fx.store.entry import Entry
from vlcache_fx.store.eviction import Priorities, RecentEvictions, cost_of


class MemoryStore(Store):
    """Evicts the entries that are cheapest to lose when ``capacity_bytes`` is exceeded, see ``eviction``.

    Entries stay on the device where they were created: on a GPU this is the device tier, without a transfer
    on a hit. Entries of slower tiers are copied; room for a copy is made before it is allocated.

    Args:
        capacity_bytes: bound on the bytes of tensor storage, positive.
    """

    tier: ClassVar[str] = "memory"
    is_local: ClassVar[bool] = True
    is_memory: ClassVar[bool] = True

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes <= 0:
            raise StoreError(f"capacity_bytes must be positive, not {capacity_bytes}")
        self._capacity = capacity_bytes
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._entries: dict[str, _Stored] = {}
        self._order = Priorities()
        self._copies: list[_Copy] = []
        self._used = 0  # with the copies
        self._evicted = RecentEvictions()
        self._listeners: tuple[OnEvict, ...] = ()
        self._hits = self._misses = self._admissions = self._evictions = self._rejections = 0
        self._removals = 0
        self._closed = False

    def get(self, key: str) -> Entry | None:
        """See ``Store.get``; the entry becomes the most recently used."""
        with self._lock:
            self._check_open()
            stored = self._entries.get(key)
            if stored is None:
                self._misses += 1
                return None
            self._hits += 1
            self._use(key, stored)
            return stored.entry

    def put(self, key: str, entry: Entry) -> bool:
        """See ``Store.put``; evicts other entries to make room."""
        size, evicted = entry.nbytes, dict[str, Entry]()
        with self._lock:
            self._check_open()
            if size > self._capacity:
                self._rejections += 1
                return False
            for other in self._copies:
                other.is_unwanted |= other.key == key  # the later put wins
            self._make_room(key, size, evicted)
            copy = None
            if self._is_ready(entry):
                self._insert(key, entry, size)
            else:
                copy = _Copy(key)
                self._copies.append(copy)
        try:
            if copy is not None:
                self._put_copy(copy, entry, size)
        finally:
            for old, dropped in evicted.items():
                for listener in self._listeners:
                    listener(old, dropped)
        return True

    def _put_copy(self, copy: _Copy, entry: Entry, size: int) -> None:
        """Copy an entry into the room that was made for it, without the lock, and insert it."""
        prepared = None
        try:
            prepared = self._prepared(entry)
        finally:
            with self._lock:
                self._copies.remove(copy)
                if prepared is None or copy.is_unwanted or self._closed:
                    self._used -= size
                else:
                    self._insert(copy.key, prepared, size)
                self._room.notify_all()

    def _is_ready(self, entry: Entry) -> bool:
        """Return whether an entry can be kept as it is."""
        return entry.tier is None

    def _prepared(self, entry: Entry) -> Entry:
        """Return an entry with memory of its own, of the same size."""
        return entry.materialized()

    def _make_room(self, key: str, size: int, evicted: dict[str, Entry]) -> None:
        """Count ``size`` bytes as used for ``key``; drop its old entry, and evict others as needed."""
        if key in self._entries:
            self._drop(key)
        while self._used + size > self._capacity:
            if not self._entries:  # copies of other threads have the room
                self._room.wait()
                self._check_open()
                if key in self._entries:
                    self._drop(key)
                continue
            old = self._order.evict()
            evicted[old] = self._drop(old, "capacity", key)
            self._evictions += 1
        self._used += size

    def _insert(self, key: str, entry: Entry, size: int) -> None:
        """Insert an entry whose bytes are counted."""
        if key in self._entries:  # another thread stored it while this one waited or copied
            self._drop(key)
        self._entries[key] = _Stored(entry, size, cost_of(entry.info))
        self._use(key, self._entries[key])
        self._evicted.forget(key)
        self._admissions += 1

    def _use(self, key: str, stored: _Stored) -> None:
        self._order.use(key, stored.cost_ms, stored.nbytes)
        stored.used_at = time.time()

    def _drop(self, key: str, cause: str = "", for_key: str = "") -> Entry:
        """Drop an entry; remember its eviction if there is a cause, else it is replaced."""
        stored = self._entries.pop(key)
        self._order.remove(key)
        self._used -= stored.nbytes
        if cause:
            self._evicted.add(Eviction(key, self.tier, time.time(), cause, stored.nbytes, for_key))
        return stored.entry

    def __contains__(self, key: object) -> bool:
        with self._lock:
            self._check_open()
            return key in self._entries

    def __len__(self) -> int:
        with self._lock:
            self._check_open()
            return len(self._entries)

    def clear(self, selection: Selection | None = None) -> int:
        """See ``Store.clear``."""
        with self._lock:
            self._check_open()
            dropped = [key for key in self._order if selection is None or selection.matches(key)]
            for key in dropped:
                self._drop(key, "cleared")
            for copy in self._copies:
                copy.is_unwanted |= selection is None or selection.matches(copy.key)
            self._removals += len(dropped)
            self._room.notify_all()
            return len(dropped)

    def entries(self) -> Iterator[EntryInfo]:
        """See ``Store.entries``."""
        with self._lock:
            self._check_open()
            listed = [(key, self._entries[key]) for key in self._order]
        for key, stored in listed:
            yield EntryInfo(key, self.tier, stored.nbytes, stored.used_at, stored.entry.info)

    def evicted(self, key: str) -> Eviction | None:
        """See ``Store.evicted``."""
        with self._lock:
            self._check_open()
            return self._evicted.get(key)

    def on_evict(self, listener: OnEvict) -> Callable[[], None]:
        """See ``Store.on_evict``."""
        with self._lock:
            self._listeners = (*self._listeners, listener)

        def stop() -> None:
            with self._lock:
                self._listeners = tuple(other for other in self._listeners if other is not listener)

        return stop

    def close(self) -> None:
        """See ``Store.close``."""
        with self._lock:
            for key in list(self._entries):
                self._drop(key)
            self._closed = True
            self._room.notify_all()

    def stats(self) -> StoreStats:
        """See ``Store.stats``; works on a closed store."""
        with self._lock:
            return StoreStats(
                entries=len(self._entries),
                used_bytes=self._used,
                capacity_bytes=self._capacity,
                hits=self._hits,
                misses=self._misses,
                admissions=self._admissions,
                evictions=self._evictions,
                rejections=self._rejections,
                removals=self._removals,
                tier=self.tier,
            )

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("the store is closed")


@dataclass(eq=False)
class _Stored:
    """An entry, and what the order of eviction needs of it."""

    entry: Entry
    nbytes: int
    cost_ms: float | None
    used_at: float = 0.0


@dataclass(eq=False)
class _Copy:
    """A copy in progress, for which room is made; unwanted after a later put or clear of its key."""

    key: str
    is_unwanted: bool = False
