"""The interface of all stores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from vlcache_fx.store.entry import Entry


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
    """

    entries: int
    used_bytes: int
    capacity_bytes: int
    hits: int = 0
    misses: int = 0
    admissions: int = 0
    evictions: int = 0
    rejections: int = 0


class Store(ABC):
    """Bounded, thread-safe map from keys to entries.

    Keys are complete (``vlcache_fx.keys.digest``), so a store never compares contents.

    Attributes:
        tier: name of the kind of memory, used in reports.
    """

    tier: ClassVar[str]

    @abstractmethod
    def get(self, key: str) -> Entry | None:
        """Return the entry under ``key``, or None. Counts a hit or a miss.

        Raises:
            StoreError: the store cannot be read.
        """

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
    def clear(self) -> None:
        """Drop all entries; keep the counts."""

    @abstractmethod
    def close(self) -> None:
        """Release all memory. Later calls except ``close`` and ``stats`` raise ``StoreClosedError``."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """Return the current counts and sizes."""
