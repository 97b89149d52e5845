"""What every store can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from vlcache_fx.store.entry import Entry


@dataclass(frozen=True)
class StoreStats:
    """Counts since the store was opened, and what it holds now.

    Attributes:
        entries: entries held.
        used_bytes: bytes of tensor storage held; never more than ``capacity_bytes``.
        capacity_bytes: the bound.
        hits: ``get`` calls that found an entry.
        misses: ``get`` calls that did not.
        admissions: entries taken in, replacements included.
        evictions: entries dropped to make room.
        rejections: entries that ``put`` refused.
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
    """A bounded map from keys to entries, safe to use from several threads.

    Keys are complete (``vlcache_fx.keys.digest``): a store never has to compare contents.

    Attributes:
        tier: name of the kind of memory, as reports show it.
    """

    tier: ClassVar[str]

    @abstractmethod
    def get(self, key: str) -> Entry | None:
        """The entry under ``key``, or None. Counts a hit or a miss.

        Raises:
            StoreError: when the store cannot be read.
        """

    @abstractmethod
    def put(self, key: str, entry: Entry) -> bool:
        """Takes the entry in, in place of one with the same key; False when it is refused as too large.

        Raises:
            StoreError: when the store cannot be written.
        """

    @abstractmethod
    def __contains__(self, key: object) -> bool:
        """Whether there is an entry; does not count, and does not make it more recent."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of entries."""

    @abstractmethod
    def clear(self) -> None:
        """Drops all entries; counts stay."""

    @abstractmethod
    def close(self) -> None:
        """Releases everything; later calls raise ``StoreClosedError``, except a second ``close``
        and ``stats``."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """Counts and sizes now."""
