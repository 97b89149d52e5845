"""Files that are not what was stored: a miss, one line in the log, the file set aside, never other bytes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_fx.errors import DamagedEntryError, StoreError
from vlcache_fx.store import Entry
from vlcache_fx.store.file import FileStore, entry_file

from .files import bytes_on_disk, entry, file_of, lines, same

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(params=["mapped", "copy"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FileStore]:
    store = FileStore(tmp_path, 1 << 20, secret=b"s" * 32, reads=request.param)
    yield store
    store.close()


def found(store: FileStore, key: str) -> Entry | None:
    """The entry with all its bytes, or None where it is missing or damaged."""
    got = store.get(key)
    try:
        return None if got is None else got.materialized()
    except DamagedEntryError:
        return None


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace a file with changed content."""
    content = change(path.read_bytes())
    path.unlink()
    path.write_bytes(content)


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def with_format(content: bytes) -> bytes:
    return content.replace(entry_file.FORMAT.encode(), b"vlcache-entry-9", 1)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "torn header": lambda content: content[:100],
    "torn tensor": lambda content: content[:-1],
    "appended": lambda content: content + b"\0",
    "flipped length": flipped(1),
    "flipped header": flipped(30),
    "flipped first byte": lambda content: flipped(8 + struct.unpack("<Q", content[:8])[0])(content),
    "flipped last byte": lambda content: content[:-1] + bytes([content[-1] ^ 128]),
    "another format": with_format,
    "another program's": lambda content: b"P" * 4096,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_file_is_a_miss(
    store: FileStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    store.put("a", entry(mark=1))
    store.put("b", entry(mark=2))
    rewritten(file_of(tmp_path, "a"), damage)
    caplog.clear()
    assert found(store, "a") is None
    assert found(store, "a") is None
    assert store.flush(60)  # the thread that verifies ahead may have noticed first, and still be counting
    (line,) = lines(caplog)
    assert "set aside: entry a is damaged" in line
    assert "\n" not in line
    assert "a" not in store
    assert len(list((tmp_path / "damaged").iterdir())) == 1
    gone = store.evicted("a")
    assert gone is not None
    assert gone.cause == "damaged"
    assert store.stats().damaged == 1
    assert same(found(store, "b"), entry(mark=2))
    store.put("a", entry(mark=3))
    assert same(found(store, "a"), entry(mark=3))


def test_damage_while_it_is_read(store: FileStore, tmp_path: Path) -> None:
    """The first tensor is right and can be used; the second is not."""
    store._jobs.stop()  # verification happens where it is needed
    store.put("a", entry(mark=1))
    rewritten(file_of(tmp_path, "a"), lambda content: content[:-1] + b"!")
    got = store.get("a")
    assert got is not None
    assert got.tensors["key 1"].equal(entry(mark=1).tensors["key 1"])
    for _ in range(2):
        with pytest.raises(DamagedEntryError, match="entry a: tensor 'value 0': its bytes are not"):
            got.tensors["value 0"]
    assert "a" not in store


def test_replaced_file_is_not_set_aside(store: FileStore, tmp_path: Path) -> None:
    store._jobs.stop()
    store.put("a", entry(mark=1))
    rewritten(file_of(tmp_path, "a"), lambda content: content[:-1] + b"!")
    got = store.get("a")
    store.put("a", entry(mark=2))  # another process computed it again
    assert got is not None
    with pytest.raises(DamagedEntryError):
        got.wait()
    assert same(found(store, "a"), entry(mark=2))


def test_file_that_shrinks_after_it_was_opened(store: FileStore, tmp_path: Path) -> None:
    """An error, where touching the mapping would kill the process."""
    store._jobs.stop()
    store.put("a", entry(nbytes=65536))
    got = store.get("a")
    os.truncate(file_of(tmp_path, "a"), 8192)
    assert got is not None
    with pytest.raises(DamagedEntryError, match="ends early"):
        got.wait()


def test_read_error(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store._jobs.stop()
    store.put("a", entry())
    got = store.get("a")

    def fails(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fails)
        assert got is not None
        with pytest.raises(DamagedEntryError, match="cannot be read: Input/output error"):
            got.wait()
    assert len(lines(caplog)) == 1
    assert found(store, "a") is None


def test_files_of_other_keys_and_stores(
    store: FileStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = FileStore(tmp_path / "other", 1 << 20)
    other.put("b", entry(mark=9))
    other.close()
    store.put("a", entry(mark=1))
    store.put("b", entry(mark=2))
    shutil.copy(file_of(tmp_path, "a"), file_of(tmp_path, "b"))
    assert found(store, "b") is None
    store.put("b", entry(mark=2))
    shutil.copy(file_of(tmp_path / "other", "b"), file_of(tmp_path, "b"))
    assert found(store, "b") is None
    assert ["entry of another key, a" in line or "this store's secret" in line for line in lines(caplog)] == [
        True
    ] * 2
    assert same(found(store, "a"), entry(mark=1))


def test_links_and_folders_in_place_of_files(store: FileStore, tmp_path: Path) -> None:
    store.put("a", entry(mark=1))
    path = file_of(tmp_path, "a")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert found(store, "a") is None
    assert not path.exists()
    assert store.put("a", entry(mark=1))


def test_vanished_file(store: FileStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store.put("a", entry())
    file_of(tmp_path, "a").unlink()
    assert store.get("a") is None
    store.flush()
    assert store.get("a") is None
    store.flush()
    assert lines(caplog) == ["vlcache: the file of entry a has vanished"]
    assert "a" not in store
    assert store.stats().used_bytes == 0


def test_vanished_folder(store: FileStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store.put("a", entry())
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    tmp_path.rmdir()
    for _ in range(3):
        assert store.get("a") is None
        store.flush()
    (line,) = lines(caplog)
    assert "has vanished" in line
    for _ in range(3):
        with pytest.raises(StoreError, match="has vanished"):
            store.put("a", entry())
    assert len(lines(caplog)) == 1
    assert store.stats().failures == 6
    assert not tmp_path.exists()  # it may be a disk that is not mounted
    tmp_path.mkdir()


@pytest.mark.parametrize("content", [None, b"", b"not a database at all" * 99])
def test_lost_index_is_made_anew(
    store: FileStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    for mark, key in enumerate("abc"):
        store.put(key, entry(mark=mark))
    rewritten(file_of(tmp_path, "c"), lambda content: content[:50])
    caplog.clear()
    for path in tmp_path.glob("index.sqlite*"):
        path.unlink()
    if content is not None:
        (tmp_path / "index.sqlite").write_bytes(content)
    assert same(found(store, "a"), entry(mark=0))
    assert "b" in store
    (line,) = lines(caplog)
    assert "made anew from 2 files" in line
    assert store.put("d", entry(mark=4))
    assert sorted(info.key for info in store.entries()) == ["a", "b", "d"]
    assert dict(next(iter(store.entries())).info).keys() == {"mark"}


def test_damaged_index_in_use(store: FileStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(200):
        store.put(f"k{number}", entry(64, mark=number % 7))
    connection = sqlite3.connect(tmp_path / "index.sqlite")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    with open(tmp_path / "index.sqlite", "r+b") as file:
        file.seek(4096)
        file.write(os.urandom(16 * 4096))
    caplog.clear()
    assert same(found(store, "k3"), entry(64, mark=3))  # hits do not need the index
    for _ in range(3):
        with contextlib.suppress(StoreError):
            store.put("new", entry(64, mark=9))
    assert len(store) == 201
    assert [line for line in lines(caplog) if "damaged" in line and "made anew from 200 files" in line]


def test_locked_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process that holds the index delays no hit, and costs writes alone."""
    monkeypatch.setattr("vlcache_fx.store.file.connections.BUSY_TIMEOUT_S", 0.05)
    store = FileStore(tmp_path, 1 << 20)
    store.put("a", entry(mark=1))
    holder = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    assert same(found(store, "a"), entry(mark=1))
    assert "a" in store
    assert store.get("b") is None
    for _ in range(2):
        with pytest.raises(StoreError, match="locked"):
            store.put("b", entry())
    assert len(lines(caplog)) == 1
    holder.execute("ROLLBACK")
    holder.close()
    assert store.put("b", entry())
    store.close()


def test_set_aside_files_are_bounded(tmp_path: Path) -> None:
    capacity = 100_000
    store = FileStore(tmp_path, capacity)
    for number in range(30):
        store.put(f"k{number}", entry(mark=number))
        rewritten(file_of(tmp_path, f"k{number}"), flipped(-5))
        assert found(store, f"k{number}") is None
    kept = list((tmp_path / "damaged").iterdir())
    assert 0 < len(kept) <= 16
    assert sum(path.stat().st_size for path in kept) <= capacity // 4
    assert store.put("large", entry(capacity - 1000))
    assert bytes_on_disk(tmp_path) <= capacity
    store.close()


Change = tuple[str, str, int]


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["flip", "cut", "append", "swap", "copy"]),
            st.sampled_from("abc"),
            st.integers(0, 1 << 16),
        ),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(["mapped", "copy"]),
)
def test_never_other_bytes(
    tmp_path_factory: pytest.TempPathFactory, changes: list[Change], reads: str
) -> None:
    directory = tmp_path_factory.mktemp("store")
    store = FileStore(directory, 1 << 20, reads=reads)
    entries = {key: entry(512, mark) for mark, key in enumerate("abc")}
    for key, value in entries.items():
        store.put(key, value)
    for kind, key, number in changes:
        path, other = file_of(directory, key), file_of(directory, "abc"[number % 3])
        content = path.read_bytes()
        at = number % max(len(content), 1)
        if kind == "flip" and content:
            rewritten(path, lambda c, at=at, n=number: c[:at] + bytes([c[at] ^ (1 << n % 8)]) + c[at + 1 :])
        elif kind == "cut":
            rewritten(path, lambda c, at=at: c[:at])
        elif kind == "append":
            rewritten(path, lambda c, n=number: c + bytes(n % 300))
        elif kind == "swap" and other != path:
            theirs = other.read_bytes()
            rewritten(other, lambda c, content=content: content)
            rewritten(path, lambda c, theirs=theirs: theirs)
        elif kind == "copy" and other != path:
            shutil.copy(other, path)
    for key, value in entries.items():
        got = found(store, key)
        assert got is None or same(got, value)
    store.close()


def test_header_covers_all_it_says(tmp_path: Path) -> None:
    """Whoever has no secret cannot move, retype or rename a tensor, or change the info."""
    store = FileStore(tmp_path, 1 << 20)
    for field, old, new in [
        ("dtype", '"U8"', '"I8"'),
        ("shape", "[2048]", "[1024, 2]"),
        ("info", '"mark\\\\": 0', '"mark\\\\": 1'),
        ("name", '"key 1": {', '"key 2": {'),
    ]:
        store.put("a", entry())
        content = file_of(tmp_path, "a").read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = content[8 : 8 + length].decode()
        changed = header.replace(old.replace("\\\\", "\\"), new.replace("\\\\", "\\"), 1)
        assert changed != header, field
        json.loads(changed)
        data = changed.encode()
        file_of(tmp_path, "a").unlink()
        file_of(tmp_path, "a").write_bytes(struct.pack("<Q", len(data)) + data + content[8 + length :])
        assert found(store, "a") is None, old
    store.close()
