"""A store that fails at random."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from typing import ClassVar

from vlcache_fx.bench.stress.settings import FaultRates
from vlcache_fx.bench.stress.wrapper import StoreWrapper
from vlcache_fx.errors import DamagedEntryError, StoreError
from vlcache_fx.store.base import Store
from vlcache_fx.store.entry import Entry, Wait


class FaultyStore(StoreWrapper):
    """Passes calls on to ``inner``; some fail as a store may fail: with a ``StoreError``, at once or late.

    Args:
        inner: the store that is disturbed; closed with this one.
        seed: seed of the faults.
        rates: chances of each fault.
        on_fault: called with the name of each injected fault, from any thread.
    """

    tier: ClassVar[str] = "faulty"

    def __init__(
        self, inner: Store, seed: int | str, rates: FaultRates, on_fault: Callable[[str], None]
    ) -> None:
        super().__init__(inner)
        self._rates, self._on_fault = rates, on_fault
        self._draw, self._lock = random.Random(seed), threading.Lock()  # noqa: S311 - no secret

    def get(self, key: str) -> Entry | None:
        """See ``Store.get``; fails at random, or returns an entry that proves damaged when it is used."""
        self._fail("read error (EIO)", self._rates.read_error, OSError(errno.EIO, os.strerror(errno.EIO)))
        self._fail_for_any("reading")
        entry = self.inner.get(key)
        if entry is None or not entry.tensors or not self._due(self._rates.late_damage):
            return entry
        self._on_fault("damaged on arrival")
        return _damaged(entry, key, self.inner.tier)

    def put(self, key: str, entry: Entry) -> bool:
        """See ``Store.put``; fails at random."""
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._fail("write error (ENOSPC)", self._rates.write_error, full)
        self._fail_for_any("writing")
        return self.inner.put(key, entry)

    def _fail_for_any(self, verb: str) -> None:
        memory = MemoryError("cannot allocate memory")
        self._fail(f"no memory while {verb}", self._rates.allocation, memory)
        if self._due(self._rates.timeout):
            time.sleep(self._rates.timeout_s)
            self._fail(f"timeout while {verb}", 1.0, TimeoutError("timed out"))

    def _fail(self, fault: str, rate: float, cause: Exception) -> None:
        if self._due(rate):
            self._on_fault(fault)
            raise StoreError(f"injected: {cause}") from cause

    def _due(self, rate: float) -> bool:
        with self._lock:
            return self._draw.random() < rate


def _damaged(entry: Entry, key: str, tier: str) -> Entry:
    """Return the entry as one whose last tensor is damaged, which shows when it is read."""

    def fail() -> None:
        raise DamagedEntryError(f"injected: the bytes of {key} are not those that were stored")

    tensors = {name: entry.peek(name) for name in entry.tensors}
    waits: dict[str, Wait] = {name: wait for name in tensors if (wait := entry.wait_of(name)) is not None} | {
        list(tensors)[-1]: fail
    }
    return Entry.pending(tensors, entry.info, waits, entry.tier or tier)
