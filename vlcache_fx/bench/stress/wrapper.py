"""A store in front of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.store.base import EntryInfo, Eviction, OnEvict, Store, StoreStats
from vlcache_fx.store.entry import Entry


class StoreWrapper(Store):
    """Passes all calls on to ``inner``; subclasses change some.

    Args:
        inner: the wrapped store; closed with this one.
    """

    tier: ClassVar[str] = "wrapper"

    def __init__(self, inner: Store) -> None:
        self.inner = inner

    @property
    def is_local(self) -> bool:  # type: ignore[override]
        """See ``Store``."""
        return self.inner.is_local

    def get(self, key: str) -> Entry | None:
        """See ``Store.get``."""
        return self.inner.get(key)

    def put(self, key: str, entry: Entry) -> bool:
        """See ``Store.put``."""
        return self.inner.put(key, entry)

    def __contains__(self, key: object) -> bool:
        return key in self.inner

    def __len__(self) -> int:
        return len(self.inner)

    def clear(self, selection: Selection | None = None) -> int:
        """See ``Store.clear``."""
        return self.inner.clear(selection)

    def entries(self) -> Iterator[EntryInfo]:
        """See ``Store.entries``."""
        return self.inner.entries()

    def evicted(self, key: str) -> Eviction | None:
        """See ``Store.evicted``."""
        return self.inner.evicted(key)

    def on_evict(self, listener: OnEvict) -> Callable[[], None]:
        """See ``Store.on_evict``."""
        return self.inner.on_evict(listener)

    def flush(self, timeout_s: float | None = None) -> bool:
        """See ``Store.flush``."""
        return self.inner.flush(timeout_s)

    def close(self) -> None:
        """See ``Store.close``."""
        self.inner.close()

    def stats(self) -> StoreStats:
        """See ``Store.stats``."""
        return self.inner.stats()
