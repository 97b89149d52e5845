"""A store in a folder that processes share and that outlives them."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from vlcache_fx.errors import DamagedEntryError, StoreClosedError, StoreError
from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.store.base import EntryInfo, Eviction, Store, StoreStats
from vlcache_fx.store.entry import Entry, Json, contexts_in, is_better
from vlcache_fx.store.file.entry_file import Writer, encode, read_metadata
from vlcache_fx.store.file.folder import Folder
from vlcache_fx.store.file.index import FileIndex
from vlcache_fx.store.file.jobs import Jobs
from vlcache_fx.store.file.opened_file import OpenedFile, verify_ahead
from vlcache_fx.store.secret import authentication_code, load_secret
from vlcache_fx.store.tally import Tally

log = logging.getLogger("vlcache_fx")

TOUCHES = 64
"""Hits after which the index learns of them, unless a write tells it before."""

READS = ("mapped", "copy")


class FileStore(Store):
    """Entries as files, bounded for all processes that open the folder together.

    A hit opens a file, and its tensors are verified while the first ones are used already, see
    ``opened_file``. A file that is damaged, foreign or gone is a miss with one line in the log, and set aside
    in the folder ``damaged``. What cannot be written is a ``StoreError``, logged once until a write succeeds.
    Nothing is synced to the disk: what a power cut tears is noticed when it is read.

    Args:
        directory: an absolute path; created with mode 0700.
        capacity_bytes: bound on the bytes of all files but the index, positive. It becomes the bound of all
            processes.
        secret: the secret; by default that in the folder, which is created.
        reads: ``mapped`` or ``copy``: into memory of its own, for folders into whose files others may write.
        keeps_capacity: keep the bound of a folder that has one.
        write: writes bytes to a file descriptor, for tests.

    Raises:
        StoreError: the folder cannot be used, or was made with another secret.
    """

    tier: ClassVar[str] = "file"
    is_local: ClassVar[bool] = True

    def __init__(
        self,
        directory: Path | str,
        capacity_bytes: int,
        *,
        secret: bytes | None = None,
        reads: str = "mapped",
        keeps_capacity: bool = False,
        write: Writer = os.write,
    ) -> None:
        if capacity_bytes <= 0:
            raise StoreError(f"capacity_bytes must be positive, not {capacity_bytes}")
        if reads not in READS:
            raise StoreError(f"reads={reads!r} is not valid: it must be one of {', '.join(READS)}")
        path = Path(directory)
        if not path.is_absolute():
            raise StoreError(f"{str(directory)!r} is no absolute path")
        self._reads, self._write = reads, write
        self._folder = Folder(path)
        self._is_writable = self._folder.prepare()
        self._secret = load_secret(path / "secret") if secret is None else secret
        scan = functools.partial(_scan, self._folder, self._secret)  # without a reference to this store
        marker = authentication_code(self._secret, b"marker")
        self._index = FileIndex(self._folder, self._is_writable, marker, capacity_bytes, scan)
        self._close_index = weakref.finalize(self, self._index.close)
        if self._is_writable:
            if not keeps_capacity:
                self._index.set_capacity(capacity_bytes)
            self._index.sweep()
        else:
            log.warning("vlcache: the folder %s is read-only: entries are found, none is stored", path)
        self._totals = self._index.totals()
        self._tally = Tally()
        self._touched: dict[str, float] = {}
        self._closed, self._lock = False, threading.Lock()
        self._jobs = Jobs("vlcache-file", 2)

    def get(self, key: str) -> Entry | None:
        """See ``Store.get``."""
        self._check_open()
        opened = self._opened(key)
        self._tally.count("misses" if opened is None else "hits")
        if opened is None:
            return None
        self._tally.worked("read")
        self._jobs.submit(functools.partial(verify_ahead, weakref.ref(opened)))
        with self._lock:
            self._touched[key] = time.time()
            is_time = len(self._touched) >= TOUCHES
        if is_time:
            self._jobs.submit(self._tell_touches)
        return opened.entry(self.tier)

    def info_of(self, key: str) -> Mapping[str, Json] | None:
        """See ``Store.info_of``."""
        self._check_open()
        opened = self._opened(key)
        return None if opened is None else opened.info

    def _opened(self, key: str) -> OpenedFile | None:
        path = self._folder.path_of(key)
        try:
            return OpenedFile(path, key, self._secret, self._reads == "mapped", self._set_aside)
        except DamagedEntryError:
            return None
        except (FileNotFoundError, NotADirectoryError):
            self._jobs.submit(functools.partial(self._check_vanished, key))
        except OSError as error:
            self._tally.failed("read", f"entry {key} cannot be read: {error.strerror or error}")
        return None

    def _set_aside(self, key: str, inode: tuple[int, int] | None, cause: str) -> None:
        text = f"entry {key} is damaged: {cause}"
        if not self._is_writable:
            self._tally.count("damaged")
            self._tally.failed("read", text)
            return
        try:
            if self._index.set_aside(key, inode):  # else another reader was faster
                self._tally.count("damaged")
                log.warning("vlcache: set aside: %s", " ".join(text.split()))
        except StoreError as error:
            self._tally.count("damaged")
            self._tally.failed("read", f"{text}; it stays, since {error}")

    def _check_vanished(self, key: str) -> None:
        """Forget an entry whose file someone removed. Eviction commits after it removed files, so wait."""
        try:
            if self._is_writable and self._index.has(key) and self._index.forget_vanished(key):
                self._tally.count("damaged")
                log.warning("vlcache: the file of entry %s has vanished", key)
        except StoreError as error:
            self._tally.failed("read", str(error))

    def put(self, key: str, entry: Entry) -> bool:
        """See ``Store.put``.

        Raises:
            StoreError: nothing was stored; what was reserved is free again.
        """
        self._check_open()
        try:
            stored = self._put(key, entry)
        except DamagedEntryError:
            raise  # of the entry that was given
        except (OSError, StoreError) as error:
            text = str(error) if isinstance(error, StoreError) else f"{error.strerror or error}"
            self._tally.failed("write", f"entry {key} was not stored in {self._folder.path}: {text}")
            raise StoreError(f"entry {key} was not stored in {self._folder.path}: {text}") from error
        self._tally.worked("write")
        self._tally.count("admissions" if stored else "rejections")
        return stored

    def _put(self, key: str, entry: Entry) -> bool:
        if not self._is_writable:
            raise StoreError("the folder is read-only")
        if entry.nbytes > self._index.totals()[2]:
            return False
        if contexts_in(entry.info) and self._folder.path_of(key).exists():
            found = self._opened(key)
            if found is not None and is_better(found.entry(self.tier), entry):
                return True
        encoded = encode(key, entry, self._secret)
        self._tell_touches()
        with self._folder.new_file() as (handle, path):
            fits, evicted = self._index.reserve(key, encoded.nbytes, path)
            if not fits:
                return False
            self._tally.count("evictions", evicted)
            try:
                encoded.write(handle, self._write)
                self._index.publish(key, encoded.nbytes, entry.info, path)
            except BaseException:
                # What the folder does not take back now, the next writer in need sweeps.
                with contextlib.suppress(StoreError, OSError):
                    path.unlink(missing_ok=True)
                    self._index.release(path)
                raise
        return True

    def __contains__(self, key: object) -> bool:
        self._check_open()
        with contextlib.suppress(StoreError):
            return isinstance(key, str) and self._index.has(key)
        return False

    def __len__(self) -> int:
        self._check_open()
        return self.stats().entries

    def clear(self, selection: Selection | None = None) -> int:
        """See ``Store.clear``; also removes what killed writers left.

        Raises:
            StoreError: the folder cannot be written.
        """
        self._check_open()
        dropped = self._index.clear(selection)
        self._tally.count("removals", dropped)
        return dropped

    def entries(self) -> Iterator[EntryInfo]:
        """See ``Store.entries``."""
        self._check_open()
        for key, nbytes, used_at, info in self._index.listing():
            yield EntryInfo(key, self.tier, nbytes, used_at, json.loads(info))

    def evicted(self, key: str) -> Eviction | None:
        """See ``Store.evicted``."""
        self._check_open()
        with contextlib.suppress(StoreError):
            return self._index.evicted(key, self.tier)
        return None

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait for work in the background, and let the index know of hits."""
        self._check_open()
        is_done = self._jobs.flush(timeout_s)
        self._tell_touches()
        return is_done

    def close(self) -> None:
        """See ``Store.close``; the files stay."""
        with self._lock:
            was_closed, self._closed = self._closed, True
        if was_closed:
            return
        self._jobs.stop()
        with contextlib.suppress(StoreError):
            self._tell_touches()
            self._totals = self._index.totals()
        self._close_index()

    def stats(self) -> StoreStats:
        """See ``Store.stats``; entries and bytes are those of all processes."""
        if not self._closed:
            with contextlib.suppress(StoreError):
                self._totals = self._index.totals()
        counts: dict[str, Any] = self._tally.counts()
        return StoreStats(*self._totals, tier=self.tier, **counts)

    def _tell_touches(self) -> None:
        with self._lock:
            touched, self._touched = self._touched, {}
        if touched and self._is_writable:
            with contextlib.suppress(StoreError):  # costs a better order of eviction
                self._index.touch(touched)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("the store is closed")


def _scan(folder: Folder, secret: bytes) -> Iterator[tuple[str, int, float, Mapping[str, Json]]]:
    for path in folder.files():
        with contextlib.suppress(DamagedEntryError, OSError):
            key, info = read_metadata(path, secret)
            status = path.stat()
            if path == folder.path_of(key):
                yield key, status.st_size, status.st_mtime, info
