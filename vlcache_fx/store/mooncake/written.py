"""What this process has written to a Mooncake Store and believes stored: the bound of one client."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.store.base import EntryInfo
from vlcache_fx.store.mooncake.manifest import Manifest


@dataclass(frozen=True)
class _Record:
    manifest: Manifest
    used_at: float


class Written:
    """The entries that this process wrote, least recently used first.

    Args:
        capacity_bytes: bound on their bytes.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._used = 0

    def __len__(self) -> int:
        return len(self._records)

    @property
    def used_bytes(self) -> int:
        """Their bytes."""
        return self._used

    def add(self, manifest: Manifest) -> None:
        """Note an entry, in the stead of an older one under its key."""
        with self._lock:
            self._drop(manifest.key)
            self._records[manifest.key] = _Record(manifest, time.time())
            self._used += manifest.nbytes

    def touch(self, key: str) -> None:
        """Note that an entry was found."""
        with self._lock:
            if key in self._records:
                self._records[key] = _Record(self._records[key].manifest, time.time())
                self._records.move_to_end(key)

    def drop(self, key: str) -> None:
        """Forget an entry."""
        with self._lock:
            self._drop(key)

    def make_room(self, nbytes: int, key: str) -> list[Manifest]:
        """Forget entries until ``nbytes`` more fit, and return them; that of ``key`` makes room itself."""
        evicted = []
        with self._lock:
            own = self._records[key].manifest.nbytes if key in self._records else 0
            for old in list(self._records):
                if self._used - own + nbytes <= self.capacity_bytes:
                    break
                if old != key:
                    evicted.append(self._records[old].manifest)
                    self._drop(old)
        return evicted

    def clear(self, selection: Selection | None) -> None:
        """Forget the selected entries."""
        with self._lock:
            for key in [key for key in self._records if selection is None or selection.matches(key)]:
                self._drop(key)

    def entries(self, tier: str) -> Iterator[EntryInfo]:
        """Yield the entries."""
        with self._lock:
            records = list(self._records.values())
        for record in records:
            manifest = record.manifest
            yield EntryInfo(manifest.key, tier, manifest.nbytes, record.used_at, manifest.info)

    def _drop(self, key: str) -> None:
        record = self._records.pop(key, None)
        if record is not None:
            self._used -= record.manifest.nbytes
