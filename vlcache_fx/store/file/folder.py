"""The folder of a file store: where its files are, and what is done with them outside the index.

::

    DIR/            mode 0700
        secret      mode 0600, unless the caller gives one
        marker      shows which secret the files were written with
        index.sqlite
        entries/<2 digits>/<key>.safetensors
        writing/    files that are being written; each is locked by its writer
        damaged/    files that were set aside, the latest few
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

from vlcache_fx.errors import StoreError
from vlcache_fx.store.file.entry_file import inode_of

log = logging.getLogger("vlcache_fx")

MOST_DAMAGED = 16
"""Files kept in ``damaged/``; their bytes count towards the bound, and are at most a quarter of it."""

LEAST_FREE_BYTES = 1 << 20
"""Free space that a file system must have when a store is opened."""

ABANDONED_AFTER_S = 3600.0
"""Age of a half-written file that nobody can still be writing, in seconds."""


class Folder:
    """Paths of a store, and operations on its files.

    Args:
        path: an absolute path; ``prepare`` makes the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index, self.lock = path / "index.sqlite", path / "lock"
        self.entries, self.writing, self.damaged = path / "entries", path / "writing", path / "damaged"

    def prepare(self) -> bool:
        """Create the folder where it is missing; return whether it can be written.

        Raises:
            StoreError: it is a file, belongs to someone else, cannot be read, or its file system is full.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._tighten()
            is_writable = os.access(self.path, os.W_OK | os.X_OK, effective_ids=True)
            if is_writable:
                for folder in (self.entries, self.writing, self.damaged):
                    folder.mkdir(mode=0o700, exist_ok=True)
                free = os.statvfs(self.path)
                if free.f_bavail * free.f_frsize < LEAST_FREE_BYTES:
                    raise StoreError(
                        f"no space for a store in {self.path}: {free.f_bavail * free.f_frsize} bytes are "
                        f"free, and {LEAST_FREE_BYTES} are needed"
                    )
            os.listdir(self.path)
        except FileExistsError as error:
            raise StoreError(f"{error.filename} is no folder: a store needs a folder of its own") from error
        except NotADirectoryError as error:
            raise StoreError(f"{self.path} lies below a file: a store needs a folder of its own") from error
        except OSError as error:
            raise StoreError(f"cannot use the folder {self.path}: {error.strerror}") from error
        return is_writable

    def _tighten(self) -> None:
        status = self.path.stat()
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o077 == 0:
            return
        if status.st_uid != os.geteuid():
            raise StoreError(
                f"the folder {self.path} has mode {mode:04o} and belongs to user {status.st_uid}: "
                f"a store needs a folder that no one else can read or write, mode 0700"
            )
        try:
            self.path.chmod(0o700)
        except OSError as error:
            raise StoreError(f"the folder {self.path} has mode {mode:04o}: set it to 0700") from error
        log.warning(
            "vlcache: the folder %s had mode %04o; others could read it: set to 0700", self.path, mode
        )

    def check_marker(self, code: str) -> None:
        """Compare the code that the folder was made with; note it in a new folder.

        Raises:
            StoreError: the folder was made with another secret.
            OSError: it cannot be read or written.
        """
        path = self.path / "marker"
        if not path.exists():
            with self.new_file() as (handle, new):
                os.write(handle, code.encode())
                with contextlib.suppress(FileExistsError):
                    os.link(new, path)
        if path.read_bytes() != code.encode():
            raise StoreError(
                f"the folder {self.path} was made with another secret: give that one, or another folder"
            )

    def path_of(self, key: str) -> Path:
        """Return the path of an entry's file."""
        digest = blake3(key.encode()).hexdigest()
        name = key if re.fullmatch(r"\w[\w.-]{0,200}", key, re.ASCII) else f"key_{digest}"
        return self.entries / digest[:2] / f"{name}.safetensors"

    def files(self) -> Iterator[Path]:
        """Yield the files of entries."""
        yield from self.entries.glob("[0-9a-f][0-9a-f]/*.safetensors")

    @contextlib.contextmanager
    def new_file(self) -> Iterator[tuple[int, Path]]:
        """Create a file to write an entry to; it is locked as long as the body runs, then gone or renamed."""
        path = self.writing / f"{time.time_ns()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.writing.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle, path
        finally:
            os.close(handle)
            with contextlib.suppress(OSError):
                path.unlink()

    def is_abandoned(self, path: Path) -> bool:
        """Return whether the writer of a new file has died: the lock goes with it, in any container."""
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return time.time() - path.stat().st_mtime > ABANDONED_AFTER_S
        finally:
            os.close(handle)
        return True

    def remove_abandoned(self, reserved: set[str]) -> None:
        """Remove half-written files of dead writers, but those named in ``reserved``."""
        for item in os.scandir(self.writing):
            path = Path(item.path)
            with contextlib.suppress(OSError):
                # A younger one may be about to be locked.
                is_old = time.time() - item.stat().st_mtime > 60.0
                if is_old and item.name not in reserved and self.is_abandoned(path):
                    path.unlink()

    def discard_unfinished(self) -> None:
        """Remove all files that are being written; their writers notice when they publish them."""
        for path in self.writing.glob("*"):
            path.unlink(missing_ok=True)

    def publish(self, new: Path, key: str) -> None:
        """Give a written file its name, in place of an earlier file of the key."""
        path = self.path_of(key)
        path.parent.mkdir(mode=0o700, exist_ok=True, parents=True)
        os.rename(new, path)

    def remove(self, key: str) -> None:
        """Remove an entry's file. Who has opened it keeps its bytes."""
        self.path_of(key).unlink(missing_ok=True)

    def set_aside(self, key: str, inode: tuple[int, int] | None, limit_bytes: int) -> bool:
        """Move an entry's file to ``damaged/``, or remove it if it is larger than ``limit_bytes``.

        Args:
            key: its key.
            inode: of the damaged file; a file that replaced it stays. None for any file.
            limit_bytes: bound of ``damaged/``.

        Returns:
            False if the file is no longer there.
        """
        path = self.path_of(key)
        try:
            status = path.lstat()
            if inode is not None and inode_of(status) != inode:
                return False
            if status.st_size > limit_bytes or not stat.S_ISREG(status.st_mode):
                path.unlink()
                return True
            self.damaged.mkdir(mode=0o700, exist_ok=True)
            os.rename(path, self.damaged / f"{time.time_ns()}-{path.name}")
        except FileNotFoundError:
            return False
        self.trim_damaged(limit_bytes)
        return True

    def damaged_bytes(self) -> int:
        """Return the bytes of files that were set aside."""
        return sum(size for size, _ in self._set_aside())

    def trim_damaged(self, limit_bytes: int) -> None:
        """Keep the latest files that were set aside, within bounds."""
        total = 0
        for count, (size, path) in enumerate(self._set_aside()):
            total += size
            if count >= MOST_DAMAGED or total > limit_bytes:
                path.unlink(missing_ok=True)

    def _set_aside(self) -> list[tuple[int, Path]]:
        """Sizes and paths, latest first."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for item in os.scandir(self.damaged):
                with contextlib.suppress(FileNotFoundError):
                    found.append((item.stat(follow_symlinks=False).st_size, Path(item.path)))
        return sorted(found, key=lambda one: one[1].name, reverse=True)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Let one process at a time prepare the index."""
        handle = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
