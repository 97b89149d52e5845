"""Drops the pages of files from the kernel's cache, to read them from the disk."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

PROBED_BYTES = 1 << 18
"""One page in this many bytes is asked about."""


def drop_page_cache(paths: Iterable[Path]) -> float:
    """Write files to the disk, and ask the kernel to forget their pages.

    The kernel may ignore it: for pages that some process maps, and in file systems without a disk.

    Returns:
        The share of the pages that are no longer cached; 0.0 where the kernel does not tell.
    """
    gone = total = 0
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            for offset in range(0, os.fstat(handle).st_size, PROBED_BYTES):
                total += 1
                gone += not _is_cached(handle, offset)
        finally:
            os.close(handle)
    return gone / total if total else 0.0


def _is_cached(handle: int, offset: int) -> bool:
    """Return whether a byte can be read without the disk; True where the file system does not tell."""
    try:
        os.preadv(handle, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
