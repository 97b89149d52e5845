"""The index of a file store: one SQLite database (WAL) for all processes that share the folder.

Whoever writes a file first reserves its bytes, in the transaction that evicts what is in the way: entries and
reservations together never exceed the bound. Files are removed and renamed before the commit, so a process
that is killed in between leaves rows without files, which are misses, and no files without rows.

GreedyDual-Size (Cao and Irani, USENIX 1997) says what is evicted: the least ``clock + cost / bytes``.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from vlcache_fx.errors import StoreError
from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.store.base import Eviction
from vlcache_fx.store.entry import Json
from vlcache_fx.store.file import rows
from vlcache_fx.store.file.connections import Connections
from vlcache_fx.store.file.folder import Folder

log = logging.getLogger("vlcache_fx")


class FileIndex:
    """Which entries there are, and which bytes are reserved.

    Args:
        folder: the folder; eviction removes its files.
        is_writable: False where nothing may be written.
        marker: a code that shows which secret the store has.
        capacity_bytes: the bound of a new index, in bytes.
        scan: yields key, bytes, time in seconds and info of the files, for a new index.

    Raises:
        StoreError: the index cannot be opened, or belongs to a store with another secret.
    """

    version = 1

    def __init__(
        self,
        folder: Folder,
        is_writable: bool,
        marker: str,
        capacity_bytes: int,
        scan: Callable[[], Iterable[tuple[str, int, float, Mapping[str, Json]]]],
    ) -> None:
        self._folder, self._marker, self._first_capacity, self._scan = folder, marker, capacity_bytes, scan
        self._connections = Connections(folder, is_writable, self)
        with self._connections.read():
            pass

    def create(self, connection: sqlite3.Connection, cause: str) -> None:
        """See ``Tables``."""
        for statement in rows.SCHEMA.split(";"):
            connection.execute(statement)
        facts = {"clock": 0.0, "capacity_bytes": self._first_capacity}
        connection.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
        # Their reservations are lost, so they could never be published. Before the scan: a writer that was
        # about to rename its file either did, and the scan finds it, or fails.
        self._folder.discard_unfinished()
        found = list(self._scan())
        for key, nbytes, at, info in found:
            rows.insert(connection, key, nbytes, at, info)
        if found or cause != "missing":
            log.warning(
                "vlcache: the index %s was %s: made anew from %d files", self._folder.index, cause, len(found)
            )
        self._fit(connection, self._first_capacity, "")

    def check(self, connection: sqlite3.Connection) -> None:
        """See ``Tables``."""
        connection.execute("SELECT count(*), sum(nbytes) FROM entries").fetchone()
        self._folder.check_marker(self._marker)

    def set_capacity(self, capacity_bytes: int) -> None:
        """Set the bound for all processes; evict what exceeds it."""
        with self._connections.write() as tx:
            tx.execute("UPDATE facts SET value = ? WHERE name = 'capacity_bytes'", (capacity_bytes,))
            self._folder.trim_damaged(capacity_bytes // 4)
            self._fit(tx, capacity_bytes, "")

    def sweep(self) -> None:
        """Remove what killed writers left, and files that are no entries."""
        with self._connections.write() as tx:
            self._sweep_reservations(tx)
            self._sweep_files(tx)

    def reserve(self, key: str, nbytes: int, file: Path) -> tuple[bool, int]:
        """Reserve bytes for a file that will be written; evict what is in the way.

        Returns:
            False if it is larger than the bound; the number of evicted entries.

        Raises:
            StoreError: writes that are under way leave too little.
        """
        with self._connections.write() as tx:
            capacity = int(rows.fact(tx, "capacity_bytes"))
            if nbytes > capacity:
                return False, 0
            self._folder.trim_damaged(min(capacity // 4, capacity - nbytes))
            evicted = self._fit(tx, capacity, key, nbytes)
            tx.execute("INSERT INTO reservations VALUES (?, ?, ?)", (file.name, key, nbytes))
            return True, evicted

    def publish(self, key: str, nbytes: int, info: Mapping[str, Json], file: Path) -> None:
        """Make a written file the entry of its key, in place of an earlier one.

        Raises:
            StoreError: its reservation is gone.
        """
        with self._connections.write() as tx:
            if not tx.execute("DELETE FROM reservations WHERE file = ?", (file.name,)).rowcount:
                raise StoreError(f"the reservation of {key} is gone: its writer took too long")
            self._folder.publish(file, key)
            rows.insert(tx, key, nbytes, time.time(), info)
            tx.execute("DELETE FROM evictions WHERE key = ?", (key,))
            # The bound may have become smaller since.
            self._fit(tx, int(rows.fact(tx, "capacity_bytes")), key)

    def release(self, file: Path) -> None:
        """Give back what was reserved for a file."""
        with self._connections.write() as tx:
            tx.execute("DELETE FROM reservations WHERE file = ?", (file.name,))

    def touch(self, used_at: Mapping[str, float]) -> None:
        """Note when entries were last found, in seconds since the epoch."""
        with self._connections.write() as tx:
            tx.executemany(
                "UPDATE entries SET used_at = max(used_at, ?), priority = max(priority, weight + "
                "(SELECT value FROM facts WHERE name = 'clock')) WHERE key = ?",
                [(at, key) for key, at in used_at.items()],
            )

    def set_aside(self, key: str, inode: tuple[int, int] | None) -> bool:
        """Set a damaged file aside; return False if it was replaced, or nothing is left to be done."""
        with self._connections.write() as tx:
            limit = int(rows.fact(tx, "capacity_bytes")) // 4
            was_moved = self._folder.set_aside(key, inode, limit)
            if not was_moved and self._folder.path_of(key).exists():
                return False
            return rows.forget(tx, key, "damaged") or was_moved

    def forget_vanished(self, key: str) -> bool:
        """Forget an entry whose file is gone; return whether there was one."""
        with self._connections.write() as tx:
            return not self._folder.path_of(key).exists() and rows.forget(tx, key, "damaged")

    def clear(self, selection: Selection | None) -> int:
        """Drop the selected entries; return how many."""
        with self._connections.write() as tx:
            keys = [key for (key,) in tx.execute("SELECT key FROM entries")]
            dropped = [key for key in keys if selection is None or selection.matches(key)]
            for key in dropped:
                self._folder.remove(key)
                rows.forget(tx, key, "cleared")
            self._sweep_reservations(tx)
            self._sweep_files(tx)
            return len(dropped)

    def has(self, key: str) -> bool:
        """Return whether there is an entry."""
        with self._connections.read() as connection:
            return connection.execute("SELECT 1 FROM entries WHERE key = ?", (key,)).fetchone() is not None

    def totals(self) -> tuple[int, int, int]:
        """Return the number of entries, the bytes of entries and reservations, and the bound."""
        with self._connections.read() as connection:
            (count,) = connection.execute("SELECT count(*) FROM entries").fetchone()
            return count, rows.used(connection), int(rows.fact(connection, "capacity_bytes"))

    def listing(self) -> list[tuple[str, int, float, str]]:
        """Return key, bytes, time of the last use and info of all entries; the first are evicted first."""
        with self._connections.read() as connection:
            order = "SELECT key, nbytes, used_at, info FROM entries ORDER BY priority, used_at"
            return connection.execute(order).fetchall()

    def evicted(self, key: str, tier: str) -> Eviction | None:
        """Return why there is no entry, if it is remembered."""
        with self._connections.read() as connection:
            row = connection.execute(
                "SELECT at, cause, nbytes, for_key FROM evictions WHERE key = ? ORDER BY number DESC", (key,)
            ).fetchone()
        return None if row is None else Eviction(key, tier, *row)

    def close(self) -> None:
        """Close the connections."""
        self._connections.close()

    def _fit(self, tx: sqlite3.Connection, capacity: int, for_key: str, nbytes: int = 0) -> int:
        """Evict until ``nbytes`` more fit; return how many were evicted."""
        room = capacity - self._folder.damaged_bytes() - nbytes
        if rows.used(tx) <= room:
            return 0
        self._sweep_reservations(tx)
        excess = rows.used(tx) - room
        if excess > rows.entry_bytes(tx) and nbytes:
            raise StoreError(f"no room for {nbytes} bytes of {for_key}: others are writing")
        evicted = 0
        # What is replaced goes first.
        order = "SELECT key, nbytes, priority FROM entries ORDER BY key = ? DESC, priority, used_at"
        for key, size, priority in tx.execute(order, (for_key,)).fetchall() if excess > 0 else ():
            if excess <= 0:
                break
            self._folder.remove(key)
            excess -= size
            if key == for_key:
                tx.execute("DELETE FROM entries WHERE key = ?", (key,))
                continue
            rows.forget(tx, key, "capacity", for_key)
            tx.execute("UPDATE facts SET value = max(value, ?) WHERE name = 'clock'", (priority,))
            evicted += 1
        return evicted

    def _sweep_reservations(self, tx: sqlite3.Connection) -> None:
        """Give back what dead writers reserved; one may have died between its file's name and its commit."""
        for name, key in tx.execute("SELECT file, key FROM reservations").fetchall():
            file, path = self._folder.writing / name, self._folder.path_of(key)
            if not self._folder.is_abandoned(file):
                continue
            file.unlink(missing_ok=True)
            row = tx.execute("SELECT nbytes FROM entries WHERE key = ?", (key,)).fetchone()
            if path.exists() and (row is None or path.stat().st_size != row[0]):
                path.unlink(missing_ok=True)
                tx.execute("DELETE FROM entries WHERE key = ?", (key,))
            tx.execute("DELETE FROM reservations WHERE file = ?", (name,))

    def _sweep_files(self, tx: sqlite3.Connection) -> None:
        """Remove files without rows; those that are being written are named in a transaction, so have one."""
        kept = {self._folder.path_of(key) for (key,) in tx.execute("SELECT key FROM entries")}
        for path in self._folder.files():
            if path not in kept:
                path.unlink(missing_ok=True)
        reserved = {name for (name,) in tx.execute("SELECT file FROM reservations")}
        self._folder.remove_abandoned(reserved)
