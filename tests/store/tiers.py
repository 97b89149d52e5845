"""Small tiers for tests: slow, failing and hanging ones, and entries under keys of the real form."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from vlcache_fx.keys.entry_key import KeyScope, Selection
from vlcache_fx.store import Entry, EntryInfo, MemoryStore, Store, StoreStats

TENANT = KeyScope("tenant", "model")
OTHER = KeyScope("other", "model")


def key(number: int, scope: KeyScope = TENANT) -> str:
    return scope.key("donor", {"number": number})


def entry(nbytes: int, mark: int = 0, **info: Any) -> Entry:
    return Entry({"x": torch.full((nbytes,), mark % 256, dtype=torch.uint8)}, {"mark": mark, **info})


def mark(found: Entry | None) -> int | None:
    if found is None:
        return None
    value = found.info["mark"]
    assert isinstance(value, int)
    assert bool((found.tensors["x"] == value % 256).all())
    return value


class SlowStore(Store):
    """A slow tier over a ``MemoryStore``: entries arrive, writes wait for ``gate``, ``error`` is raised."""

    tier = "slow"
    is_local = True

    def __init__(self, capacity_bytes: int = 1 << 20, *, is_local: bool = True) -> None:
        self.memory = MemoryStore(capacity_bytes)
        self.is_local = is_local  # type: ignore[misc]
        self.gate, self.writing = threading.Event(), threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.reads = self.writes = self.waits = 0

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error

    def get(self, key: str) -> Entry | None:
        self.reads += 1
        self._fail()
        found = self.memory.get(key)
        if found is None:
            return None
        return Entry.pending(found.tensors, found.info, dict.fromkeys(found.tensors, self._arrive), self.tier)

    def _arrive(self) -> None:
        self.waits += 1

    def put(self, key: str, entry: Entry) -> bool:
        self.writes += 1
        self.writing.set()
        assert self.gate.wait(60)
        self._fail()
        return self.memory.put(key, entry)

    def __contains__(self, key: object) -> bool:
        self._fail()
        return key in self.memory

    def __len__(self) -> int:
        return len(self.memory)

    def clear(self, selection: Selection | None = None) -> int:
        self._fail()
        return self.memory.clear(selection)

    def entries(self) -> Iterator[EntryInfo]:
        self._fail()
        for info in self.memory.entries():
            yield EntryInfo(info.key, self.tier, info.nbytes, info.used_at, info.info)

    def close(self) -> None:
        self.memory.close()

    def stats(self) -> StoreStats:
        return replace(self.memory.stats(), tier=self.tier)
