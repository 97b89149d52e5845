"""Faults of a folder of entries, made from outside the processes that use it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

ENTRIES, INDEX = "entries", "index.sqlite"
"""Names in the folder of a file tier."""

BOUNDED = (ENTRIES, "damaged", "writing")
"""Folders whose files count towards its bound."""

AT_FDCWD = -100
"""The working folder, for system calls."""


class FolderFaults:
    """Damages a file tier's folder at random.

    Args:
        folder: the folder.
        seed: seed of the faults.
        in_place: also write to files that others may be reading.
    """

    def __init__(self, folder: Path, seed: int, *, in_place: bool = True) -> None:
        self._folder, self._draw = folder, random.Random(f"folder-{seed}")  # noqa: S311 - no secret
        self._locked: list[Path] = []
        faults: dict[str, tuple[Callable[[], bool], int]] = {
            "flipped byte, file replaced": (lambda: self._replace(self._flipped), 8),
            "truncated, file replaced": (lambda: self._replace(self._shortened), 8),
            "file deleted": (self._delete, 8),
            "files swapped": (self._swap, 8),
            "foreign file": (self._foreign, 2),
            "no permission": (self._lock, 2),
            "folder of entries deleted": (self._delete_entries, 1),
            "index overwritten": (self._overwrite_index, 1),
            "index deleted": (self._delete_index, 1),
        }
        if in_place:
            faults["flipped byte, in place"] = (self._flip_in_place, 8)
            faults["truncated, in place"] = (self._truncate_in_place, 8)
        self.faults: Mapping[str, tuple[Callable[[], bool], int]] = faults

    def inject(self, fault: str | None = None) -> str | None:
        """Make a fault, by default a random one. Return its name; None if there was nothing to damage."""
        self._unlock()
        if fault is None:
            weights = [weight for _, weight in self.faults.values()]
            fault = self._draw.choices(list(self.faults), weights)[0]
        try:
            return fault if self.faults[fault][0]() else None
        except OSError:  # others evicted the file meanwhile
            return None

    def close(self) -> None:
        """Give back permissions."""
        self._unlock()

    def _files(self) -> list[Path]:
        return sorted(path for path in (self._folder / ENTRIES).rglob("*") if path.is_file())

    def _file(self) -> Path | None:
        files = self._files()
        return self._draw.choice(files) if files else None

    def _replace(self, damage: Callable[[bytes], bytes]) -> bool:
        path = self._file()
        if path is None:
            return False
        temporary = self._folder / f"damaged-{os.getpid()}"
        temporary.write_bytes(damage(path.read_bytes()))
        try:
            _exchange(temporary, path)
        finally:
            temporary.unlink()
        return True

    def _flipped(self, data: bytes) -> bytes:
        changed = bytearray(data)
        if changed:
            changed[self._draw.randrange(len(changed))] ^= 1 << self._draw.randrange(8)
        return bytes(changed)

    def _shortened(self, data: bytes) -> bytes:
        return data[: self._draw.randrange(len(data))] if data else data

    def _flip_in_place(self) -> bool:
        path = self._file()
        if path is None or not path.stat().st_size:
            return False
        with path.open("r+b") as file:
            offset = self._draw.randrange(path.stat().st_size)
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 1]) if byte else b"")
        return True

    def _truncate_in_place(self) -> bool:
        path = self._file()
        if path is None or not path.stat().st_size:
            return False
        os.truncate(path, self._draw.randrange(path.stat().st_size))
        return True

    def _delete(self) -> bool:
        path = self._file()
        if path is not None:
            path.unlink()
        return path is not None

    def _swap(self) -> bool:
        by_size: dict[int, list[Path]] = {}
        for path in self._files():
            by_size.setdefault(path.stat().st_size, []).append(path)
        # Of one size: nobody can keep a bound on files that grow under a name.
        groups = [paths for paths in by_size.values() if len(paths) > 1]
        if not groups:
            return False
        first, second = self._draw.sample(self._draw.choice(groups), 2)
        _exchange(first, second)
        return True

    def _foreign(self) -> bool:
        path = self._file()
        if path is None:
            return False
        with path.open("r+b") as file:
            file.truncate(file.write(self._draw.randbytes(100)))
        return True

    def _lock(self) -> bool:
        path = self._file()
        if path is not None:
            path.chmod(0)
            self._locked.append(path)
        return path is not None

    def _unlock(self) -> None:
        for path in self._locked:
            with contextlib.suppress(OSError):
                path.chmod(0o600)
        self._locked.clear()

    def _delete_entries(self) -> bool:
        shutil.rmtree(self._folder / ENTRIES, ignore_errors=True)
        return True

    def _overwrite_index(self) -> bool:
        index = self._folder / INDEX
        with index.open("r+b") as file:
            file.write(self._draw.randbytes(200))
        return True

    def _delete_index(self) -> bool:
        index = self._folder / INDEX
        for suffix in ("", "-wal", "-shm"):
            Path(f"{index}{suffix}").unlink(missing_ok=True)
        return True


def _exchange(first: Path, second: Path) -> None:
    """Exchange two files at once.

    A plain rename would bring back the name of a file that the store evicts at this moment: bytes that the
    store does not know of, and cannot bound.

    Raises:
        OSError: one of them is gone.
    """
    renameat2, exchange = ctypes.CDLL(None, use_errno=True).renameat2, 2
    if renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), exchange):
        raise OSError(ctypes.get_errno(), "cannot exchange", str(first), None, str(second))


def stored_bytes(folder: Path) -> int:
    """Return the bytes of files that count towards the bound and lay in the folder at one moment, or less.

    Listing takes time in which files come and go. Files that two listings show lay there between the two.
    """
    return sum(size for _, _, size in _listing(folder) & _listing(folder))


def _listing(folder: Path) -> set[tuple[str, int, int]]:
    """Path, inode and bytes of each file."""
    found = set()
    for name in BOUNDED:
        for path in (folder / name).rglob("*"):
            with contextlib.suppress(OSError):
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    found.add((str(path), status.st_ino, status.st_size))
    return found
