"""Checks that a store returns nothing under a key but what was put there."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from pathlib import Path
from typing import ClassVar

from vlcache_fx.bench.stress.wrapper import StoreWrapper
from vlcache_fx.errors import StoreError
from vlcache_fx.keys.digest import content_digest
from vlcache_fx.store.base import Store
from vlcache_fx.store.entry import Entry


class Ledger:
    """The digests of all entries that any process put, by key, in a file that all append to.

    Args:
        path: the file; created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._digests: dict[str, set[str]] = defaultdict(set)
        self._read_to = 0
        path.touch()

    def note(self, key: str, digest: str) -> None:
        """Note that an entry with this digest is stored under ``key``."""
        with self._lock:
            if digest in self._digests[key]:
                return
            self._digests[key].add(digest)
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(handle, f"{key} {digest}\n".encode())  # one write: lines of processes do not mix
        finally:
            os.close(handle)

    def knows(self, key: str, digest: str) -> bool:
        """Return whether an entry with this digest was put under ``key``."""
        with self._lock:
            if digest not in self._digests[key]:
                self._read()
            return digest in self._digests[key]

    def _read(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._read_to)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read_to += len(whole) + len(newline)
        for line in whole.decode().splitlines():
            key, _, digest = line.partition(" ")
            self._digests[key].add(digest)


class AuditedStore(StoreWrapper):
    """Passes calls on to ``inner``, and remembers which entries each thread got.

    Args:
        inner: the audited store; closed with this one.
        ledger: notes what is put, and knows what others put.
    """

    tier: ClassVar[str] = "audited"

    def __init__(self, inner: Store, ledger: Ledger) -> None:
        super().__init__(inner)
        self._ledger, self._thread = ledger, threading.local()

    def get(self, key: str) -> Entry | None:
        """See ``Store.get``; the entry is checked by ``wrong_keys``."""
        entry = self.inner.get(key)
        if entry is not None:
            self._got().append((key, entry))
        return entry

    def put(self, key: str, entry: Entry) -> bool:
        """See ``Store.put``; notes the entry first, because other threads may find it at once."""
        self._ledger.note(key, _digest(entry))
        return self.inner.put(key, entry)

    def wrong_keys(self) -> list[str]:
        """Return the keys under which this thread got bytes that nobody put there, since the last call.

        Entries that say themselves that they are damaged are in order.
        """
        got, wrong = self._got(), []
        for key, entry in got:
            try:
                if not self._ledger.knows(key, _digest(entry)):
                    wrong.append(key)
            except StoreError:
                continue
        got.clear()
        return wrong

    def _got(self) -> list[tuple[str, Entry]]:
        if not hasattr(self._thread, "got"):
            self._thread.got = []
        got: list[tuple[str, Entry]] = self._thread.got
        return got


def _digest(entry: Entry) -> str:
    """Return the digest of the tensors, in the order of their names; waits for them."""
    return content_digest([(name, entry.tensors[name]) for name in sorted(entry.tensors)])
