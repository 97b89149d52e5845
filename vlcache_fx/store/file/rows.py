"""Tables of a file store's index, and single statements on them."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping
from typing import Any

from vlcache_fx.store.entry import Json
from vlcache_fx.store.eviction import cost_of, priority

MOST_EVICTIONS = 4096
"""Evictions that are remembered, the latest."""

SCHEMA = """
CREATE TABLE entries(key TEXT PRIMARY KEY, nbytes INTEGER NOT NULL, priority REAL NOT NULL,
    weight REAL NOT NULL, used_at REAL NOT NULL, created_at REAL NOT NULL, info TEXT NOT NULL);
CREATE INDEX by_priority ON entries(priority, used_at, nbytes);
CREATE TABLE reservations(file TEXT PRIMARY KEY, key TEXT NOT NULL, nbytes INTEGER NOT NULL);
CREATE TABLE evictions(number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, at REAL NOT NULL,
    cause TEXT NOT NULL, nbytes INTEGER NOT NULL, for_key TEXT NOT NULL);
CREATE INDEX evictions_by_key ON evictions(key);
CREATE TABLE facts(name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
"""


def insert(tx: sqlite3.Connection, key: str, nbytes: int, at: float, info: Mapping[str, Json]) -> None:
    """Insert an entry's row, or replace it; it was used at ``at``, in seconds since the epoch."""
    weight = priority(0.0, cost_of(info), nbytes)  # to be added to the clock
    values = (key, nbytes, fact(tx, "clock") + weight, weight, at, at, json.dumps(dict(info)))
    tx.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", values)


def forget(tx: sqlite3.Connection, key: str, cause: str, for_key: str = "") -> bool:
    """Delete an entry's row and remember why; return whether there was one."""
    row = tx.execute("SELECT nbytes FROM entries WHERE key = ?", (key,)).fetchone()
    if row is None:
        return False
    tx.execute("DELETE FROM entries WHERE key = ?", (key,))
    tx.execute("DELETE FROM evictions WHERE key = ?", (key,))
    values = (key, time.time(), cause, row[0], for_key)
    number = tx.execute(
        "INSERT INTO evictions(key, at, cause, nbytes, for_key) VALUES (?, ?, ?, ?, ?)", values
    ).lastrowid
    tx.execute("DELETE FROM evictions WHERE number <= ?", ((number or 0) - MOST_EVICTIONS,))
    return True


def fact(connection: sqlite3.Connection, name: str) -> Any:
    """Return ``clock`` or ``capacity_bytes``."""
    (value,) = connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return value


def used(connection: sqlite3.Connection) -> int:
    """Return the bytes of entries and reservations."""
    (reserved,) = connection.execute("SELECT coalesce(sum(nbytes), 0) FROM reservations").fetchone()
    return entry_bytes(connection) + int(reserved)


def entry_bytes(connection: sqlite3.Connection) -> int:
    """Return the bytes of entries."""
    (total,) = connection.execute("SELECT coalesce(sum(nbytes), 0) FROM entries").fetchone()
    return int(total)
