"""``vlcache store``, on a stand-in that is opened in the place of ``file://`` and ``mooncake://``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vlcache_fx.cli import app
from vlcache_fx.errors import DamagedEntryError, StoreError
from vlcache_fx.keys.entry_key import EntryKey, KeyScope, Selection, model_tag, salt_tag
from vlcache_fx.store import Entry, MemoryStore
from vlcache_fx.store.base import Eviction

from .helpers import run

ONE, TWO = "1" * 64, "2" * 64
URL = "mooncake://localhost:1"


class StandIn(MemoryStore):
    """A slow tier whose entries may be damaged, and that is not emptied when it is closed."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.damaged: set[str] = set()
        self.missing: set[str] = set()
        self.dropped: dict[str, Eviction] = {}
        self.opened: list[str] = []
        self.closed = 0

    def get(self, key: str) -> Entry | None:
        if key in self.missing:
            return None
        entry = super().get(key)
        if entry is None:
            return None

        def wait() -> None:
            if key in self.damaged:
                raise DamagedEntryError(f"{key} is damaged")

        return Entry.pending(entry.tensors, entry.info, dict.fromkeys(entry.tensors, wait), self.tier)

    def evicted(self, key: str) -> Eviction | None:
        return self.dropped.get(key)

    def close(self) -> None:
        self.closed += 1


def key_of(content: str, salt: str = "", model: str = ONE, kind: str = "donor") -> EntryKey:
    return KeyScope(salt, model).key(kind, {"content": content, "weights": model})


KEYS = [key_of("a"), key_of("b", "tenant"), key_of("c", model=TWO), key_of("d", kind="features")]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    store = StandIn()
    for number, key in enumerate(KEYS, 1):
        store.put(key, Entry({"k": torch.zeros(256 * number)}, {"parts": dict(key.parts)}))

    def opens(url: str, capacity_bytes: int, *, strict: bool) -> StandIn:
        assert strict
        store.opened.append(url)
        return store

    monkeypatch.setattr("vlcache_fx.store.open_store", opens)
    monkeypatch.delenv("VLCACHE_STORE", raising=False)
    yield store
    assert store.closed == len(store.opened)


def data(*arguments: str) -> Any:
    """What a command prints to stdout with ``--json``."""
    result = CliRunner().invoke(app, ["store", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: str) -> str:
    """Run a command that must end with status 2; return its output."""
    result = CliRunner().invoke(app, ["store", *arguments])
    assert result.exit_code == 2, result.output
    return result.output


# ls, stats -------------------------------------------------------------------------------------------------


def test_ls(store: StandIn) -> None:
    found = data("ls", URL)
    assert [entry["key"] for entry in found["entries"]] == [str(key) for key in KEYS]
    assert (found["count"], found["nbytes"]) == (4, 10 * 1024)
    first = found["entries"][0]
    assert (first["kind"], first["salt"], first["model"]) == ("donor", salt_tag(""), model_tag(ONE))
    output = run("store", "ls", URL, "--limit", "2")
    assert KEYS[1][-64:-52] in output
    assert KEYS[2][-64:-52] not in output
    assert "4 entries, 10.0 KiB (2 shown)" in output


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (["--salt", "tenant"], [1]),
        (["--salt", salt_tag("tenant")], [1]),
        (["--salt", ""], [0, 2, 3]),
        (["--model", TWO], [2]),
        (["--model", model_tag(TWO)], [2]),
        (["--kind", "donor", "--model", ONE], [0, 1]),
        (["--kind", "features"], [3]),
        (["--salt", "nobody"], []),
    ],
)
def test_ls_of_some(store: StandIn, options: list[str], numbers: list[int]) -> None:
    found = data("ls", URL, *options)
    assert [entry["key"] for entry in found["entries"]] == [str(KEYS[number]) for number in numbers]


def test_stats(store: StandIn) -> None:
    found = data("stats", URL)
    assert (found["entries"], found["used_bytes"], found["capacity_bytes"]) == (4, 10240, 1 << 20)
    assert found["kinds"]["features"] == {"entries": 1, "nbytes": 4096}
    output = run("store", "stats", URL)
    assert "1.0 MiB" in output
    assert "donor: 3 entries, 6.0 KiB" in output


# verify ----------------------------------------------------------------------------------------------------


def test_verify(store: StandIn) -> None:
    assert run("store", "verify", URL).splitlines() == ["reading entries: 4", "4 intact"]
    assert data("verify", URL, "--kind", "donor")["counts"]["intact"] == 3
    assert run("store", "verify", URL, "--salt", "nobody").splitlines()[-1] == "no entries"


def test_verify_finds_damage(store: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    store.damaged = {KEYS[0]}
    store.missing = {KEYS[1], KEYS[2]}
    store.dropped = {KEYS[1]: Eviction(KEYS[1], "file", 1e9, "damaged", 1)}  # set aside when it was opened
    result = CliRunner().invoke(app, ["store", "verify", URL, "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["counts"] == {"intact": 1, "damaged": 2, "unreadable": 0, "gone": 1}
    assert found["damaged"] == [str(KEYS[0]), str(KEYS[1])]

    def fails(key: str) -> None:
        raise StoreError("no connection")

    monkeypatch.setattr(store, "get", fails)
    result = CliRunner().invoke(app, ["store", "verify", URL])
    assert result.exit_code == 1
    assert "4 unreadable" in result.output


def test_verify_keeps_the_order_of_eviction(store: StandIn) -> None:
    before = [entry.key for entry in store.entries()]
    run("store", "verify", URL)
    assert [entry.key for entry in store.entries()] == before


# evict, clear ----------------------------------------------------------------------------------------------


def test_evict_to(store: StandIn) -> None:
    found = data("evict", URL, "--to", "8KiB")
    assert found == {"dropped": 2, "nbytes": 3 * 1024, "keys": [str(KEYS[0]), str(KEYS[1])]}
    assert [entry.key for entry in store.entries()] == KEYS[2:]
    assert "dropped 0 entries" in run("store", "evict", URL, "--to", "1GiB")


@pytest.mark.parametrize("name", [str(KEYS[2]), KEYS[2][-64:-50]])
def test_evict_key(store: StandIn, name: str) -> None:
    assert "dropped 1 entry, 3.0 KiB" in run("store", "evict", URL, name)
    assert KEYS[2] not in store


def test_clear_asks(store: StandIn) -> None:
    result = CliRunner().invoke(app, ["store", "clear", URL], input="n\n")
    assert result.exit_code == 1
    assert len(store) == 4
    result = CliRunner().invoke(app, ["store", "clear", URL], input="y\n")
    assert result.exit_code == 0
    assert "drop 4 entries, 10.0 KiB?" in result.output
    assert len(store) == 0


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ([], []),
        (["--salt", "tenant"], [0, 2, 3]),
        (["--model", model_tag(ONE)], [2]),
        (["--kind", "donor"], [3]),
    ],
)
def test_clear_some(store: StandIn, options: list[str], left: list[int]) -> None:
    assert data("clear", URL, "--yes", *options)["dropped"] == 4 - len(left)
    assert [entry.key for entry in store.entries()] == [KEYS[number] for number in left]


# why -------------------------------------------------------------------------------------------------------


def test_why_of_a_stored_key(store: StandIn) -> None:
    output = run("store", "why", URL, KEYS[0][-64:-50])
    assert KEYS[0] in output
    assert "memory: 1.0 KiB, last used" in output
    assert f"content: {KEYS[0].parts['content']}" in output
    found = data("why", URL, str(KEYS[0]))
    assert found["reason"] is None
    assert found["stored"][0]["parts"] == dict(KEYS[0].parts)


def test_why_of_an_evicted_key(store: StandIn) -> None:
    store.clear(Selection(key=KEYS[0]))
    store.dropped = {KEYS[0]: Eviction(KEYS[0], "file", 1e9, "capacity", 1024, KEYS[1])}
    assert "was dropped from the file tier at 2001-09-09" in run("store", "why", URL, str(KEYS[0]))
    assert data("why", URL, str(KEYS[0]))["eviction"]["for_key"] == KEYS[1]


def test_why_of_an_unknown_key(store: StandIn) -> None:
    store.clear(Selection(salt="", model=ONE))
    found = data("why", URL, str(key_of("a", model=TWO)))
    assert (found["reason"], found["nearest"], found["differs"]) == ("new_item", str(KEYS[2]), [])
    found = data("why", URL, str(key_of("a", "tenant", "3" * 64)))
    assert (found["nearest"], found["differs"]) == (str(KEYS[1]), ["decoder weights"])


# Addresses, and bad input ----------------------------------------------------------------------------------


def test_url_of_the_environment(store: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLCACHE_STORE", URL)
    assert data("ls")["count"] == 4
    assert data("why", str(KEYS[0]))["key"] == KEYS[0]
    assert data("evict", "--to", "9KiB")["dropped"] == 1
    assert data("evict", str(KEYS[1]))["dropped"] == 1
    assert "why needs a key" in refused("why")
    assert store.opened == [URL] * 4


def test_folders(store: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.sqlite").touch()
    monkeypatch.chdir(tmp_path)
    for address in (f"file://{tmp_path}?capacity=8GiB&reads=copy", str(tmp_path), "."):
        run("store", "ls", address)
    # Without the bound: it would become that of all processes.
    assert store.opened == [f"file://{tmp_path}?reads=copy", f"file://{tmp_path}", f"file://{tmp_path}"]


def test_missing_folder_is_not_created(store: StandIn, tmp_path: Path) -> None:
    assert "there is no folder" in refused("ls", f"file://{tmp_path}/none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "other").mkdir()
    assert "is no store" in refused("ls", f"file://{tmp_path}/other")
    assert list((tmp_path / "other").iterdir()) == []
    assert store.opened == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["ls"], "VLCACHE_STORE"),
        (["ls", "memory://"], "memory of a process"),
        (["ls", URL, "--kind", "donors"], "kind='donors' is not valid"),
        (["ls", URL, "--limit", "0"], "--limit"),
        (["evict", URL, "--to", "much"], "'much' is no positive number of bytes"),
        (["evict", URL, str(KEYS[0]), "--to", "1KiB"], "either a KEY or --to"),
        (["evict", URL, "donor"], "3 entries begin with 'donor'"),
        (["evict", URL, "unknown"], "no entry has the key"),
    ],
)
def test_bad_input(store: StandIn, arguments: list[str], text: str) -> None:
    assert text in refused(*arguments)


def test_store_that_cannot_be_opened(store: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def opens(url: str, capacity_bytes: int, *, strict: bool) -> StandIn:
        raise StoreError("nothing listens at localhost:1")

    monkeypatch.setattr("vlcache_fx.store.open_store", opens)
    assert "error: nothing listens at localhost:1" in refused("stats", URL)
