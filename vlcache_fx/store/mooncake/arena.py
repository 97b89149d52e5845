"""Memory that this process and Mooncake's client share, registered once, cut into regions."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 4096
"""Bytes: of offsets of regions and tensors, a page."""


def aligned(nbytes: int) -> int:
    """Return a size rounded up to whole pages, at least one."""
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT


@dataclass(frozen=True, eq=False)
class Region:
    """Part of an arena. It is free again when nothing refers to ``view`` any more, tensors included.

    Attributes:
        offset: where it begins in the arena.
        view: its bytes.
    """

    offset: int
    view: memoryview

    def tensor(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor over the bytes from ``start``, without a copy; it keeps the region."""
        count = 1
        for size in shape:
            count *= size
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        raw = torch.frombuffer(self.view, dtype=torch.uint8, count=count * dtype.itemsize, offset=start)
        return raw.view(dtype).view(shape)


class Arena:
    """Anonymous shared memory of a fixed size. Pages that were never used take no memory.

    Args:
        nbytes: its size.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.fd = os.memfd_create("vlcache-mooncake")
        os.ftruncate(self.fd, nbytes)
        self._memory = memoryview(mmap.mmap(self.fd, nbytes))
        self._lock = threading.Lock()
        self._free: list[tuple[int, int]] = [(0, nbytes)]  # offset and size, by offset
        # Finalizers run in any thread at any time, also while the lock is held: they only append.
        self._freed: deque[tuple[int, int]] = deque()
        self._sealed = False

    def allocate(self, nbytes: int) -> Region | None:
        """Return a region of at least ``nbytes``, or None if there is no room: first fit."""
        size = aligned(nbytes)
        with self._lock:
            self._collect()
            if self._sealed:
                return None
            for index, (offset, free) in enumerate(self._free):
                if free >= size:
                    rest = [(offset + size, free - size)] if free > size else []
                    self._free[index : index + 1] = rest
                    view = self._memory[offset : offset + size]
                    weakref.finalize(view, self._freed.append, (offset, size)).atexit = False
                    return Region(offset, view)
        return None

    def free_bytes(self) -> int:
        """Return how many bytes are free."""
        with self._lock:
            self._collect()
            return sum(size for _, size in self._free)

    def seal(self) -> None:
        """Lend no more regions: a transfer that failed may still write to those that are free."""
        self._sealed = True

    def close(self) -> None:
        """Close the descriptor. Tensors in the arena stay valid."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _collect(self) -> None:
        if not self._freed:
            return
        while self._freed:
            self._free.append(self._freed.popleft())
        merged: list[tuple[int, int]] = []
        for offset, size in sorted(self._free):
            if merged and sum(merged[-1]) == offset:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((offset, size))
        self._free = merged
