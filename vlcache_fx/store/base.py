"""The interface of all stores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.store.entry import Entry, Json

OnEvict: TypeAlias = Callable[[str, Entry], None]
"""Takes the key and the value of an evicted entry."""


@dataclass(frozen=True)
class StoreStats:
    """Counts since the store was opened, and its current size.

    Attributes:
        entries: current number of entries.
        used_bytes: current bytes of tensor storage; never more than ``capacity_bytes``.
        capacity_bytes: the bound.
        hits: ``get`` calls that found an entry.
        misses: ``get`` calls that found none.
        admissions: entries stored by ``put``, replacements included.
        evictions: entries dropped to make room.
        rejections: entries rejected by ``put``.
        removals: entries dropped by ``remove`` and ``clear``.
        promotions: entries copied to a faster tier after a hit.
        write_downs: entries written to a slower tier.
        queue_drops: writes to a slower tier that the queue did not take.
        failures: reads and writes that failed; each is a miss, or a lost write.
        damaged: entries whose bytes were not those that were stored; each was set aside.
        tier: name of the tier; the names of all for a list of tiers.
        tiers: the stats of each tier, fastest first; empty for a single tier.
    """

    entries: int
    used_bytes: int
    capacity_bytes: int
    hits: int = 0
    misses: int = 0
    admissions: int = 0
    evictions: int = 0
    rejections: int = 0
    removals: int = 0
    promotions: int = 0
    write_downs: int = 0
    queue_drops: int = 0
    failures: int = 0
    damaged: int = 0
    tier: str = ""
    tiers: tuple[StoreStats, ...] = ()


@dataclass(frozen=True)
class EntryInfo:
    """An entry in a listing.

    Attributes:
        key: its key.
        tier: name of its tier.
        nbytes: its bytes in that tier.
        used_at: when it was last stored or found, in seconds since the epoch.
        info: its JSON data.
    """

    key: str
    tier: str
    nbytes: int
    used_at: float
    info: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Eviction:
    """Why an entry is no longer stored.

    Attributes:
        key: the key that it had.
        tier: name of the tier that dropped it.
        evicted_at: in seconds since the epoch.
        cause: ``capacity`` (to make room), ``cleared``, or ``damaged``.
        nbytes: its bytes.
        for_key: the entry that it made room for; empty for other causes.
    """

    key: str
    tier: str
    evicted_at: float
    cause: str
    nbytes: int
    for_key: str = ""


class Store(ABC):
    """Bounded, thread-safe map from keys to entries.

    Keys are complete (``vlcache_fx.keys.digest``), so a store never compares contents.

    Attributes:
        tier: name of the kind of memory, used in reports.
        is_local: ``in`` is answered quickly, without a network.
        is_memory: ``put`` and ``get`` take no longer than copies in memory. Such a store is never written to
            in the background.
    """

    tier: ClassVar[str]
    is_local: ClassVar[bool] = False
    is_memory: ClassVar[bool] = False

    def __repr__(self) -> str:
        stats = self.stats()
        tiers = "; ".join(_described(tier) for tier in stats.tiers or (stats,))
        return f"<{type(self).__name__} {tiers}>"

    @property
    def fastest(self) -> Store:
        """The first tier; a store of one tier itself."""
        return self

    @abstractmethod
    def get(self, key: str) -> Entry | None:
        """Return the entry under ``key``, or None. Counts a hit or a miss.

        The tensors of a slow tier may still arrive, see ``Entry``. They stay valid while the caller keeps the
        entry, also after an eviction.

        Raises:
            StoreError: the store cannot be read.
        """

    def info_of(self, key: str) -> Mapping[str, Json] | None:
        """Return an entry's JSON data, or None. Reads no tensor and counts nothing where that is possible.

        Raises:
            StoreError: the store cannot be read.
        """
        entry = self.get(key)
        return None if entry is None else entry.info

    @abstractmethod
    def put(self, key: str, entry: Entry) -> bool:
        """Store the entry, replacing an entry with the same key. Return False if it is too large.

        Raises:
            StoreError: the store cannot be written.
        """

    @abstractmethod
    def __contains__(self, key: object) -> bool:
        """Return whether an entry exists. Neither counts nor changes the order of eviction."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of entries."""

    @abstractmethod
    def clear(self, selection: Selection | None = None) -> int:
        """Drop the selected entries, by default all; keep the counts. Return how many were dropped."""

    @abstractmethod
    def entries(self) -> Iterator[EntryInfo]:
        """Yield the entries, those that are evicted first at the front. No tensor is read."""

    def evicted(self, key: str) -> Eviction | None:
        """Return why a key that was stored is no longer; None if unknown. Stores remember the latest."""
        del key
        return None

    def on_evict(self, listener: OnEvict) -> Callable[[], None]:
        """Call ``listener`` for each entry that is dropped to make room; return a function that ends this.

        It is called in the thread whose ``put`` needs the room, outside all locks of the store. It must be
        quick and must not raise. Stores whose entries are not in memory never call it.
        """
        del listener
        return lambda: None

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait for queued writes. Return False if some are left after ``timeout_s`` seconds."""
        del timeout_s
        return True

    @abstractmethod
    def close(self) -> None:
        """Release all memory. Later calls except ``close`` and ``stats`` raise ``StoreClosedError``."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """Return the current counts and sizes."""


def _described(stats: StoreStats) -> str:
    sizes = f"{stats.used_bytes / 2**20:,.1f} of {stats.capacity_bytes / 2**20:,.1f} MiB"
    return f"{stats.tier}: {stats.entries} entries, {sizes}"
