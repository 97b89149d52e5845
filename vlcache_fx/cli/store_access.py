"""Shared by the commands ``vlcache store``: opening, selecting and naming entries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlcache_fx.errors import OptionError, StoreError

if TYPE_CHECKING:
    from vlcache_fx.store.base import EntryInfo, Store

VARIABLE = "VLCACHE_STORE"
"""Environment variable with the URL, where none is given."""

FOLDER_FILES = ("index.sqlite", "secret")
"""A folder with one of these is a store: opening any other folder would make it one."""


@contextmanager
def opened(url: str | None) -> Iterator[Store]:
    """Open a store as it is: without creating a folder or changing a bound. Close it after the body.

    Args:
        url: ``file:///folder``, ``mooncake://host:port``, or the path of a folder.

    Raises:
        OptionError: the URL is missing or not valid.
        StoreError: there is no store, or it cannot be opened.
    """
    from vlcache_fx.options import Options
    from vlcache_fx.store import open_store

    if url is None:
        raise OptionError(f"no store is given: pass its URL, or set {VARIABLE}, such as file:///var/vlcache")
    store = open_store(_existing(url), Options().capacity_bytes, strict=True)
    try:
        yield store
    finally:
        store.close()


def _existing(url: str) -> str:
    """Return the URL of a store that exists, without a bound."""
    from vlcache_fx.store.url import parse_url

    if "://" not in url:
        url = f"file://{Path(url).absolute()}"
    parsed = parse_url(url)
    if parsed.scheme in ("memory", "host"):
        raise OptionError(f"{url!r} is the memory of a process: file:// and mooncake:// have commands")
    if parsed.scheme == "file":
        folder = Path(parsed.address)
        if not folder.is_dir():
            raise StoreError(f"there is no folder {parsed.address!r}")
        if not any((folder / name).exists() for name in FOLDER_FILES):
            raise StoreError(f"the folder {parsed.address!r} is no store: it has no {FOLDER_FILES[0]}")
    start, _, query = url.partition("?")
    rest = [pair for pair in query.split("&") if pair.partition("=")[0] not in ("capacity", "capacity_bytes")]
    return f"{start}?{'&'.join(rest)}" if any(rest) else start


def selected(
    store: Store, salt: str | None = None, model: str | None = None, kind: str | None = None
) -> list[EntryInfo]:
    """Return the entries that match everything given, those that are evicted first at the front.

    Args:
        store: the store.
        salt: a salt, or its tag in keys.
        model: a fingerprint of weights, or its tag in keys.
        kind: a kind of entry.

    Raises:
        OptionError: there is no such kind.
    """
    from vlcache_fx.keys.entry_key import KINDS, model_tag, salt_tag

    if kind is not None and kind not in KINDS:
        raise OptionError(f"kind={kind!r} is not valid: it must be one of {', '.join(KINDS)}")
    salts = None if salt is None else {salt, salt_tag(salt)}
    models = None if model is None else {model, model_tag(model)}
    found = []
    for entry in store.entries():
        own_kind, own_salt, own_model, _ = names_of(entry.key)
        matches_tags = (salts is None or own_salt in salts) and (models is None or own_model in models)
        if matches_tags and kind in (None, own_kind):
            found.append(entry)
    return found


def named(store: Store, name: str) -> str:
    """Return the key of an entry, given the key, or the beginning of it or of its digest.

    Returns ``name`` itself if no entry has that name.

    Raises:
        OptionError: several entries begin with it.
    """
    keys = [entry.key for entry in store.entries()]
    if name in keys:
        return name
    found = [key for key in keys if key.startswith(name) or names_of(key)[3].startswith(name)]
    if len(found) > 1:
        shown = "\n".join(found[:5])
        raise OptionError(f"{len(found)} entries begin with {name!r}; give more of the key:\n{shown}")
    return found[0] if found else name


def names_of(key: str) -> tuple[str, str, str, str]:
    """Return kind, salt, model and digest of a key; empty where it has another form."""
    kind, salt, model, digest, *_ = [*key.split("-"), "", "", ""]
    return kind, salt, model, digest


def beyond(entries: list[EntryInfo], bound: int) -> list[EntryInfo]:
    """Return the entries to drop, from the front, until ``bound`` bytes are left."""
    left, dropped = sum(entry.nbytes for entry in entries), []
    for entry in entries:
        if left <= bound:
            break
        left -= entry.nbytes
        dropped.append(entry)
    return dropped


def as_row(entry: EntryInfo) -> dict[str, Any]:
    """Return an entry as JSON data."""
    kind, salt, model, _ = names_of(entry.key)
    return {
        "key": entry.key,
        "kind": kind,
        "salt": salt,
        "model": model,
        "tier": entry.tier,
        "nbytes": entry.nbytes,
        "used_at": entry.used_at,
    }


def counted(count: int) -> str:
    """Return a number of entries, in words."""
    return "1 entry" if count == 1 else f"{count} entries"


def as_size(nbytes: int) -> str:
    """Return a number of bytes in a unit that people read."""
    size, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{nbytes} B" if unit == "B" else f"{size:.1f} {unit}"


def as_time(seconds: float) -> str:
    """Return seconds since the epoch as a time in UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
