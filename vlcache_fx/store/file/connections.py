"""Connections to the database of a file store: for threads, across forks, and when the file goes bad."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from vlcache_fx.errors import StoreError
from vlcache_fx.store.file.entry_file import inode_of
from vlcache_fx.store.file.folder import Folder

BUSY_TIMEOUT_S = 10.0
"""How long a write waits for another process's."""

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Tables(Protocol):
    """What a database must hold."""

    version: int

    def create(self, connection: sqlite3.Connection, cause: str) -> None:
        """Create and fill the tables of a new database, in a transaction; ``cause`` says why it is new."""

    def check(self, connection: sqlite3.Connection) -> None:
        """Raise StoreError if the database belongs to another store."""


class Connections:
    """A connection to read and one to write, of this process. Safe in threads and after a fork.

    Args:
        folder: the folder.
        is_writable: False where nothing may be written.
        tables: what the database must hold.
    """

    def __init__(self, folder: Folder, is_writable: bool, tables: Tables) -> None:
        self._folder, self._is_writable, self._tables = folder, is_writable, tables
        self._cause = "missing"  # why the next new database is new
        self._inherited: list[object] = []  # of the parent process: not ours to close
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._reading, self._writing = threading.Lock(), threading.Lock()
        self._opening = threading.RLock()
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None

    @contextlib.contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Give the connection for reads; they do not wait for writes.

        Raises:
            StoreError: the index cannot be read.
        """
        with self._errors():
            self._open()
            with self._reading:
                if self._reader is None:
                    raise StoreError(f"the index {self._folder.index} was closed")
                yield self._reader

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Run the body in a transaction, alone among all processes.

        Raises:
            StoreError: the index cannot be written.
        """
        with self._errors():
            self._open()
            with self._writing:
                if self._writer is None:
                    raise StoreError(f"the folder {self._folder.path} cannot be written")
                self._writer.execute("BEGIN IMMEDIATE")
                try:
                    yield self._writer
                    self._writer.execute("COMMIT")
                except BaseException:
                    with contextlib.suppress(sqlite3.Error):
                        self._writer.execute("ROLLBACK")
                    raise
            # Of an index that was deleted meanwhile nobody sees the transaction: what it reserved is not.
            if inode_of(self._folder.index.stat()) != self._inode:
                raise StoreError(f"the index {self._folder.index} was replaced during a write")

    def close(self) -> None:
        """Close both."""
        if self._pid != os.getpid():
            return
        with self._opening:
            for lock, connection in ((self._reading, self._reader), (self._writing, self._writer)):
                with lock:
                    if connection is not None:
                        connection.close()
            self._reader = self._writer = self._inode = None

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in _DAMAGED and self._is_writable:
                self._replace_damaged(str(error))
            raise StoreError(f"the index {self._folder.index} failed: {error}") from error
        except OSError as error:
            raise StoreError(f"the folder {self._folder.path} failed: {error.strerror or error}") from error

    def _open(self) -> None:
        """Connect, if that was not done in this process or the file is another one by now."""
        if self._pid != os.getpid():
            self._inherited += [self._reader, self._writer]
            self._reset()
        with contextlib.suppress(FileNotFoundError):
            if self._inode is not None and inode_of(self._folder.index.stat()) == self._inode:
                return
        with self._opening:
            self.close()
            if not self._folder.path.is_dir():
                raise StoreError(f"the folder {self._folder.path} has vanished")
            if not self._is_writable:
                self._reader = self._connect_read_only()
            else:
                with self._folder.exclusive():
                    self._writer = self._prepared()
                self._reader = _connect(f"file:{_quoted(self._folder.index)}?mode=ro")
            self._inode = inode_of(self._folder.index.stat())

    def _prepared(self) -> sqlite3.Connection:
        """Return a connection to a database with tables."""
        try:
            return self._create_if_empty()
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF not in _DAMAGED:
                raise
            self._set_aside(str(error))
            return self._create_if_empty()

    def _create_if_empty(self) -> sqlite3.Connection:
        connection = _connect(f"file:{_quoted(self._folder.index)}?mode=rwc")
        try:
            os.chmod(self._folder.index, 0o600)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, self._tables.version):
                raise StoreError(
                    f"the index {self._folder.index} has version {version}, not {self._tables.version}: "
                    f"remove it, and it is made anew from the files"
                )
            if version == 0:
                connection.execute("BEGIN IMMEDIATE")
                self._tables.create(connection, self._cause)
                connection.execute(f"PRAGMA user_version = {self._tables.version}")
                connection.execute("COMMIT")
                self._cause = "missing"
            self._tables.check(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect_read_only(self) -> sqlite3.Connection:
        """Without its journal files, a database of a read-only folder opens as one that does not change."""
        for mode in ("mode=ro", "mode=ro&immutable=1"):
            connection = _connect(f"file:{_quoted(self._folder.index)}?{mode}")
            try:
                self._tables.check(connection)
                return connection
            except sqlite3.Error as error:
                connection.close()
                failure = error
        raise failure

    def _replace_damaged(self, cause: str) -> None:
        """Make the next use start with a new database, unless another process has made one already."""
        with self._opening, contextlib.suppress(OSError, sqlite3.Error):
            with self._folder.exclusive():
                if self._inode is not None and inode_of(self._folder.index.stat()) == self._inode:
                    self._set_aside(cause)
            self.close()

    def _set_aside(self, cause: str) -> None:
        index, self._cause = self._folder.index, f"damaged ({cause})"
        for suffix in ("-wal", "-shm"):
            Path(f"{index}{suffix}").unlink(missing_ok=True)
        # Beside the new one, not among damaged entries: those count towards the bound, an index does not.
        os.replace(index, f"{index}-damaged")


def _quoted(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _connect(uri: str) -> sqlite3.Connection:
    return sqlite3.connect(
        uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
