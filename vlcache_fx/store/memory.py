"""A store in the memory of this process."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import ClassVar

from vlcache_fx.errors import StoreClosedError, StoreError
from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.store.base import EntryInfo, Store, StoreStats
from vlcache_fx.store.entry import Entry


class MemoryStore(Store):
    """Evicts the least recently used entries when ``capacity_bytes`` is exceeded.

    Entries stay on the device where they were created: on a GPU this is the device tier, without a transfer
    on a hit.

    Args:
        capacity_bytes: bound on the bytes of tensor storage, positive.
    """

    tier: ClassVar[str] = "memory"

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes <= 0:
            raise StoreError(f"capacity_bytes must be positive, not {capacity_bytes}")
        self._capacity = capacity_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # least recently used first
        self._used = 0
        self._used_at: dict[str, float] = {}
        self._hits = self._misses = self._admissions = self._evictions = self._rejections = 0
        self._removals = 0
        self._closed = False

    def get(self, key: str) -> Entry | None:
        """See ``Store.get``; the entry becomes the most recently used."""
        with self._lock:
            self._check_open()
            entry = self._entries.get(key)
            if entry is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            self._used_at[key] = time.time()
            return entry

    def put(self, key: str, entry: Entry) -> bool:
        """See ``Store.put``; evicts the least recently used entries to make room."""
        size = entry.nbytes
        with self._lock:
            self._check_open()
            if size > self._capacity:
                self._rejections += 1
                return False
            replaced = self._entries.pop(key, None)
            if replaced is not None:
                self._used -= replaced.nbytes
            while self._used + size > self._capacity:
                old, evicted = self._entries.popitem(last=False)
                self._used -= evicted.nbytes
                del self._used_at[old]
                self._evictions += 1
            self._entries[key] = entry
            self._used_at[key] = time.time()
            self._used += size
            self._admissions += 1
            return True

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
            dropped = [key for key in self._entries if selection is None or selection.matches(key)]
            for key in dropped:
                self._used -= self._entries.pop(key).nbytes
                del self._used_at[key]
            self._removals += len(dropped)
            return len(dropped)

    def entries(self) -> Iterator[EntryInfo]:
        """See ``Store.entries``."""
        with self._lock:
            self._check_open()
            listed = [(key, entry, self._used_at[key]) for key, entry in self._entries.items()]
        for key, entry, used_at in listed:
            yield EntryInfo(key, self.tier, entry.nbytes, used_at, entry.info)

    def close(self) -> None:
        """See ``Store.close``."""
        with self._lock:
            self._drop_all()
            self._closed = True

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

    def _drop_all(self) -> None:
        self._entries.clear()
        self._used_at.clear()
        self._used = 0

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("the store is closed")
