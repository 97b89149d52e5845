"""Opening stores by URL: one tier, lists, and what cannot be opened."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vlcache_fx.errors import OptionError, StoreError
from vlcache_fx.store import HostStore, MemoryStore, Store, open_store
from vlcache_fx.store.tiered import TieredStore
from vlcache_fx.store.url import Opener, StoreURL, _open, check_parameters, parse_bytes, parse_url


class SlowStore(MemoryStore):
    """Stands in for a slow tier."""

    is_memory = False


class Openers:
    """Openers with stand-ins for the slow tiers; addresses that contain ``bad`` cannot be opened."""

    def __init__(self) -> None:
        self.opened: list[Store] = []
        self.by_scheme: Mapping[str, Opener] = {
            "memory": lambda url, size: self.keep(MemoryStore(size)),
            "host": lambda url, size: self.keep(HostStore(size)),
            "file": self.slow,
            "mooncake": self.slow,
        }

    def slow(self, url: StoreURL, capacity_bytes: int) -> Store:
        check_parameters(url, "timeout_s")
        if "missing" in url.address:
            raise PermissionError(13, "Permission denied", url.address)
        if "bad" in url.address:
            raise StoreError(f"cannot open {url.address}")
        return self.keep(SlowStore(capacity_bytes))

    def keep(self, store: Store) -> Store:
        self.opened.append(store)
        return store

    def open(self, store: Any, capacity_bytes: int = 100, *, strict: bool = False) -> Store:
        return _open(store, capacity_bytes, strict, self.by_scheme)


@pytest.fixture
def openers() -> Openers:
    return Openers()


def test_open_store_memory() -> None:
    store = open_store("memory://", 123)
    assert isinstance(store, MemoryStore)
    assert store.stats().capacity_bytes == 123


def test_open_store_returns_a_store_unchanged() -> None:
    store = MemoryStore(7)
    assert open_store(store, 123) is store
    assert open_store([store], 123) is store


@pytest.mark.parametrize(
    "url", ["memory", "memory://x", "memory:", "", "s3://bucket", "/tmp", None, 3, [], [[]], [None], {}]
)
def test_open_store_invalid_urls(url: Any) -> None:
    with pytest.raises(OptionError, match="not valid") as failure:
        open_store(url, 1)
    assert "memory://" in str(failure.value)


@pytest.mark.parametrize(
    ("url", "capacity_bytes"),
    [
        ("memory://?capacity=8GiB", 8 << 30),
        ("host://?capacity_bytes=1000", 1000),
        ("host://?capacity=1.5%20kB", None),
        ("memory://?capacity=1.5KiB", 1536),
        ("memory://?capacity=500MB", 500_000_000),
    ],
)
def test_own_bounds(url: str, capacity_bytes: int | None) -> None:
    if capacity_bytes is None:
        with pytest.raises(OptionError, match="such as 8GiB"):
            open_store(url, 1)
    else:
        assert open_store(url, 1).stats().capacity_bytes == capacity_bytes


@pytest.mark.parametrize("text", ["", "8", "8 GiB", "0", "-1", "1e9", "GiB", "0.1", "8gib", "nan"])
def test_parse_bytes(text: str) -> None:
    if text in ("8", "8 GiB"):
        assert parse_bytes(text) in (8, 8 << 30)
    else:
        with pytest.raises(ValueError, match="no positive number of bytes"):
            parse_bytes(text)


def test_parse_url() -> None:
    url = parse_url("file:///var/my%20cache?capacity=1KiB&timeout_s=2")
    assert (url.scheme, url.address, url.capacity_bytes) == ("file", "/var/my cache", 1024)
    assert url.parameters == {"timeout_s": "2"}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://?capacity=1&capacity=2", "given twice"),
        ("memory://?capacity=1&capacity_bytes=2", "given twice"),
        ("memory://?capacity", "name=value"),
        ("memory://?size=3", "no parameter size; it has: capacity, capacity_bytes"),
        ("file:///d?retries=3", "no parameter retries; it has: capacity, capacity_bytes, timeout_s"),
        ("ftp://x", "there is no ftp://; it must be a URL"),
        ("memory://folder", "only parameters may follow memory://"),
    ],
)
def test_bad_urls_name_what_is_valid(openers: Openers, url: str, message: str) -> None:
    with pytest.raises(OptionError, match="not valid") as failure:
        open_store(url, 1) if url.startswith("memory") else openers.open(url)
    assert message in str(failure.value)
    assert repr(url) in str(failure.value)


def test_slow_tier_is_behind_a_queue(openers: Openers) -> None:
    store = openers.open("file:///folder")
    assert isinstance(store, TieredStore)
    assert store.tier == "memory"  # the stand-in's name
    store.close()


def test_list_of_tiers(openers: Openers) -> None:
    store = openers.open(["memory://?capacity=10B", "host://", "file:///d?capacity=1KiB", "mooncake://h:1"])
    assert isinstance(store, TieredStore)
    assert [tier.capacity_bytes for tier in store.stats().tiers] == [10, 100, 1024, 100]
    store.close()


def test_list_with_a_store(openers: Openers) -> None:
    shared = MemoryStore(5)
    store = openers.open((shared, "file:///d"))
    assert store.stats().tiers[0].capacity_bytes == 5
    store.close()


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        (["memory://", "memory://?capacity=1"], "twice"),
        (["memory://", "file:///d", "file:///d/"], "twice"),
        (["file:///d", "file:///e/../d"], "twice"),
        (["mooncake://h:1", "mooncake://h:1"], "twice"),
        (["file:///d", "memory://"], "the order is memory://, host://, file://, mooncake://"),
        (["host://", "memory://"], "behind a slower tier"),
    ],
)
def test_lists_that_make_no_sense(openers: Openers, urls: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        openers.open(urls)
    assert not openers.opened


def test_one_store_twice(openers: Openers) -> None:
    shared = MemoryStore(5)
    with pytest.raises(OptionError, match="twice"):
        openers.open([shared, shared])


def test_two_folders_are_two_tiers(openers: Openers) -> None:
    store = openers.open(["file:///fast", "file:///large"])
    assert len(store.stats().tiers) == 2
    store.close()


@pytest.mark.parametrize("address", ["bad", "missing"])
def test_strict_raises_where_a_tier_cannot_be_opened(openers: Openers, address: str) -> None:
    shared = MemoryStore(5)
    with pytest.raises(StoreError, match=f"'file:///{address}' of option store cannot be opened"):
        openers.open([shared, "host://", f"file:///{address}"], strict=True)
    with pytest.raises(StoreError, match="closed"):
        len(openers.opened[0])  # the tier that was opened
    assert len(shared) == 0  # the caller's is open


@pytest.mark.parametrize("address", ["bad", "missing"])
def test_without_strict_the_tier_is_left_out(
    openers: Openers, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "vlcache_fx"):
        store = openers.open(["memory://?capacity=10B", f"file:///{address}"])
    assert isinstance(store, MemoryStore)
    assert store.stats().capacity_bytes == 10
    (record,) = caplog.records
    assert f"file:///{address}" in record.message


def test_memory_serves_where_no_tier_is_left(openers: Openers, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vlcache_fx"):
        store = openers.open("file:///bad", 42)
    assert isinstance(store, MemoryStore)
    assert store.stats().capacity_bytes == 42
    assert len(caplog.records) == 1


def test_syntax_is_an_error_without_strict(openers: Openers) -> None:
    with pytest.raises(OptionError, match="no parameter"):
        openers.open(["memory://", "file:///d?size=1"])
    with pytest.raises(StoreError, match="closed"):
        len(openers.opened[0])


def test_folders_are_compared_with_links_resolved(openers: Openers, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OptionError, match="twice"):
        openers.open([f"file://{tmp_path}", f"file://{tmp_path}/link"])
