"""The pictures that a replica says it has in memory."""

from __future__ import annotations

import pytest
import torch

from vlcache_fx.errors import StoreError
from vlcache_fx.serve.cluster import held
from vlcache_fx.serve.cluster.held import HeldPictures
from vlcache_fx.store.entry import Entry
from vlcache_fx.store.memory import MemoryStore
from vlcache_fx.store.tiered import TieredStore


def entry() -> Entry:
    return Entry({"k": torch.zeros(4)}, {})


def test_pictures_whose_donors_are_in_memory() -> None:
    store = MemoryStore(1024)
    pictures = HeldPictures()
    pictures.add(["p", "q"], ["kp", "kq"])
    assert pictures.in_memory([store]) == []
    store.put("kp", entry())
    assert pictures.in_memory([store]) == ["p"]
    store.clear()
    assert pictures.in_memory([store]) == []


def test_only_the_fastest_tier_counts() -> None:
    first, second = MemoryStore(1024), MemoryStore(1024)
    store = TieredStore([first, second])
    try:
        second.put("kp", entry())
        pictures = HeldPictures()
        pictures.add(["p"], ["kp"])
        assert store.fastest is first
        assert pictures.in_memory([store]) == []
        first.put("kp", entry())
        assert pictures.in_memory([store]) == ["p"]
    finally:
        store.close()


def test_a_picture_with_several_spans_needs_all() -> None:
    store = MemoryStore(1024)
    pictures = HeldPictures()
    pictures.add(["p"], ["k0", "k1"])
    store.put("k0", entry())
    assert pictures.in_memory([store]) == []
    store.put("k1", entry())
    assert pictures.in_memory([store]) == ["p"]


def test_a_request_without_spans_says_nothing() -> None:
    pictures = HeldPictures()
    pictures.add(["p"], [])
    assert pictures.in_memory([MemoryStore(1024)]) == []


def test_the_latest_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "MAX_REPORTED", 2)
    store = MemoryStore(1024)
    pictures = HeldPictures()
    for name in ("p", "q", "p", "r"):
        store.put(name, entry())
        pictures.add([name], [name])
    assert pictures.in_memory([store]) == ["p", "r"]


def test_a_store_that_fails_has_nothing() -> None:
    store = MemoryStore(1024)
    pictures = HeldPictures()
    pictures.add(["p"], ["kp"])
    store.put("kp", entry())
    store.close()
    with pytest.raises(StoreError):
        _ = "kp" in store
    assert pictures.in_memory([store]) == []
