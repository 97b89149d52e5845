"""A store that is read but not written to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.store.base import EntryInfo, Eviction, Store, StoreStats
from vlcache_fx.store.entry import Entry, Json


class ReadOnlyStore(Store):
    """Reads another store. ``put`` takes every entry and keeps none; ``clear`` and ``close`` do nothing.

    Args:
        store: the store to read; its counts and its order of eviction notice the reads.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def tier(self) -> str:  # type: ignore[override]
        """Name of the store's tier."""
        return self._store.tier

    def get(self, key: str) -> Entry | None:
        """See ``Store.get``."""
        return self._store.get(key)

    def info_of(self, key: str) -> Mapping[str, Json] | None:
        """See ``Store.info_of``."""
        return self._store.info_of(key)

    def put(self, key: str, entry: Entry) -> bool:
        """Keep nothing."""
        del key, entry
        return True

    def __contains__(self, key: object) -> bool:
        return key in self._store

    def __len__(self) -> int:
        return len(self._store)

    def clear(self, selection: Selection | None = None) -> int:
        """Drop nothing."""
        del selection
        return 0

    def entries(self) -> Iterator[EntryInfo]:
        """See ``Store.entries``."""
        return self._store.entries()

    def evicted(self, key: str) -> Eviction | None:
        """See ``Store.evicted``."""
        return self._store.evicted(key)

    def close(self) -> None:
        """Leave the store open."""

    def stats(self) -> StoreStats:
        """See ``Store.stats``."""
        return self._store.stats()
