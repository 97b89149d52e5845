"""Files of entries whose tensors are verified when first needed, or in the background before that.

Verification reads the file into a small buffer, and tensors are views of a mapping of the same file. So
nothing is copied, and a read error or a missing end is an exception, where touching a mapping would kill the
process. 64 MB take 20 ms so (page cache, one core); 16 ms if the mapping itself is hashed; 50 ms as a copy in
memory of its own, most of it for new pages. What a mapping cannot notice is a process of the same user that
writes into the file, or truncates it, after it was verified. This package never does: it renames and unlinks.
Where others may, open the store with ``read=copy``.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from vlcache_fx.errors import DamagedEntryError
from vlcache_fx.store.entry import Entry, Json
from vlcache_fx.store.file.entry_file import Header, authenticate, bytes_of, code_of, inode_of, open_file

_CHUNK_BYTES = 1 << 18  # fits in a core's cache


class OpenedFile:
    """A file whose tensors are verified when first needed, or ahead of that by ``verify_ahead``.

    Args:
        path: the file.
        key: key of the entry that it must have.
        secret: secret of the store.
        is_mapped: use a mapping of the file; otherwise read into memory of its own.
        damaged: is called once if the file turns out wrong, with the key, the file's device and inode number
            (to tell it from one that replaces it; None for what is no file) and the cause.

    Raises:
        DamagedEntryError: it is not the file of this key that this store wrote.
        OSError: it cannot be read.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        secret: bytes,
        is_mapped: bool,
        damaged: Callable[[str, tuple[int, int] | None, str], None],
    ) -> None:
        self.key, self._secret, self._report = key, secret, damaged
        self._inode: tuple[int, int] | None = None
        try:
            self._handle = open_file(path)
            self._close = weakref.finalize(self, os.close, self._handle)
            self._inode = inode_of(os.fstat(self._handle))
            header = Header(self._handle)
            authenticate(header, secret, key)
        except DamagedEntryError as error:
            damaged(key, self._inode, str(error))
            raise
        self.info: dict[str, Json] = json.loads(header.metadata["info"])
        self._codes: dict[str, str] = dict(json.loads(header.metadata["codes"]))
        # What is verified is what is used: places in the file follow from places in the mapping.
        first = min((tensor.data_ptr() for tensor in header.tensors.values() if tensor.nbytes), default=0)
        self._starts = {
            name: header.nbytes + tensor.data_ptr() - first for name, tensor in header.tensors.items()
        }
        self._is_mapped = is_mapped
        self._tensors = (
            header.tensors
            if is_mapped
            else {name: torch.empty_like(tensor) for name, tensor in header.tensors.items()}
        )
        self._locks = {name: threading.Lock() for name in self._codes}
        self._verified: set[str] = set()
        self._failure: str | None = None
        self._failing = threading.Lock()

    def entry(self, tier: str) -> Entry:
        """Return the entry; its tensors wait until they are verified."""
        waits = {name: functools.partial(self.wait, name) for name in self._codes}
        return Entry.pending({name: self._tensors[name] for name in self._codes}, self.info, waits, tier)

    def wait(self, name: str) -> None:
        """Verify a tensor, unless that is done.

        Raises:
            DamagedEntryError: its bytes are not those that were stored, or cannot be read.
        """
        if name not in self._verified:
            with self._locks[name]:
                if name not in self._verified and self._failure is None:
                    self._verify(name)
        if self._failure is not None:
            raise DamagedEntryError(self._failure)

    def _verify(self, name: str) -> None:
        tensor = self._tensors[name]
        cause = "its bytes are not those that were stored"
        try:
            chunks = self._chunks(self._starts[name], bytes_of(tensor))
            code = code_of(self._secret, self.key, name, tensor, chunks)
        except OSError as error:
            code, cause = "", f"its bytes cannot be read: {error.strerror or error}"
        if not secrets.compare_digest(code, self._codes[name]):
            with self._failing:
                is_first = self._failure is None
                self._failure = f"entry {self.key}: tensor {name!r}: {cause}"
            if is_first:
                self._report(self.key, self._inode, f"tensor {name!r}: {cause}")
            return
        self._verified.add(name)
        if len(self._verified) == len(self._codes):
            self._close()

    def _chunks(self, start: int, target: memoryview) -> Iterator[memoryview]:
        """Read bytes of the file from ``start``; into ``target`` unless that is the mapping."""
        scratch = memoryview(bytearray(min(_CHUNK_BYTES, target.nbytes))) if self._is_mapped else None
        done = 0
        while done < target.nbytes:
            wanted = min(_CHUNK_BYTES, target.nbytes - done)
            chunk = target[done : done + wanted] if scratch is None else scratch[:wanted]
            count = os.preadv(self._handle, [chunk], start + done)
            if count == 0:
                raise OSError("the file ends early")
            yield chunk[:count]
            done += count


def verify_ahead(opened: weakref.ref[OpenedFile]) -> None:
    """Verify tensor after tensor, in the order of the file, as long as anybody holds the entry."""
    current = opened()
    names = [] if current is None else list(current._codes)
    del current
    for name in names:
        current = opened()
        if current is None:
            return
        try:
            current.wait(name)
        except DamagedEntryError:
            return  # whoever reads a tensor is told
        del current
