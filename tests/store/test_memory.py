"""The memory store: bounded, least recently used first, thread-safe."""

import threading
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vlcache_fx.errors import StoreError
from vlcache_fx.store import Entry, MemoryStore


def entry(nbytes: int, mark: int = 0) -> Entry:
    return Entry({"x": torch.full((nbytes,), mark, dtype=torch.uint8)}, {"mark": mark})


def test_get_counts_misses_and_hits() -> None:
    store = MemoryStore(10)
    assert store.get("a") is None
    assert store.put("a", entry(4, 7))
    found = store.get("a")
    assert found is not None
    assert found.info["mark"] == 7
    stats = store.stats()
    assert (stats.hits, stats.misses, stats.admissions, stats.entries, stats.used_bytes) == (1, 1, 1, 1, 4)


def test_put_evicts_the_least_recently_used() -> None:
    store = MemoryStore(10)
    for key in "abc":
        store.put(key, entry(3))
    store.get("a")
    assert "b" in store  # does not make it recent
    store.put("d", entry(3))
    assert [key for key in "abcd" if key in store] == ["a", "c", "d"]
    assert store.stats().evictions == 1
    assert store.stats().hits == 1


def test_put_rejects_entries_larger_than_the_store() -> None:
    store = MemoryStore(10)
    store.put("a", entry(10))
    assert not store.put("b", entry(11))
    assert not store.put("a", entry(11))
    assert "a" in store
    assert store.stats().rejections == 2
    assert store.stats().evictions == 0


def test_put_replaces_an_entry() -> None:
    store = MemoryStore(10)
    store.put("a", entry(8, 1))
    store.put("a", entry(9, 2))
    found = store.get("a")
    assert found is not None
    assert found.info["mark"] == 2
    assert (store.stats().used_bytes, store.stats().evictions) == (9, 0)


def test_clear_keeps_counts() -> None:
    store = MemoryStore(10)
    store.put("a", entry(3))
    store.clear()
    assert (len(store), store.stats().used_bytes, store.stats().admissions) == (0, 0, 1)


def test_closed_store_raises() -> None:
    store = MemoryStore(10)
    store.put("a", entry(3))
    store.close()
    store.close()
    assert store.stats().used_bytes == 0
    calls: list[Any] = [
        lambda: store.get("a"),
        lambda: store.put("a", entry(1)),
        lambda: "a" in store,
        lambda: len(store),
        store.clear,
    ]
    for call in calls:
        with pytest.raises(StoreError, match="closed"):
            call()


@pytest.mark.parametrize("capacity", [0, -1])
def test_capacity_must_be_positive(capacity: int) -> None:
    with pytest.raises(StoreError, match="positive"):
        MemoryStore(capacity)


def test_store_is_thread_safe() -> None:
    store = MemoryStore(64)
    wrong: list[str] = []

    def work(seed: int) -> None:
        for step in range(300):
            mark = (seed * 31 + step * 7) % 12
            found = store.get(str(mark))
            if found is not None and found.info["mark"] != mark:
                wrong.append(str(mark))
            store.put(str(mark), entry(1 + mark, mark))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = store.stats()
    assert not wrong
    assert stats.hits + stats.misses == stats.admissions == 4 * 300
    assert stats.used_bytes <= 64


class Model(RuleBasedStateMachine):
    """The store against a list of (key, size, mark), the most recent last."""

    keys = st.sampled_from("abcde")

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore(20)
        self.expected: list[tuple[str, int, int]] = []
        self.step = 0

    @rule(key=keys, size=st.integers(0, 25))
    def put(self, key: str, size: int) -> None:
        self.step += 1
        assert self.store.put(key, entry(size, self.step)) == (size <= 20)
        if size <= 20:
            self.expected = [e for e in self.expected if e[0] != key] + [(key, size, self.step)]
            while sum(e[1] for e in self.expected) > 20:
                del self.expected[0]

    @rule(key=keys)
    def get(self, key: str) -> None:
        found = self.store.get(key)
        there = [e for e in self.expected if e[0] == key]
        assert (found is not None) == bool(there)
        if found is not None:
            assert found.info["mark"] == there[0][2]
            self.expected.remove(there[0])
            self.expected.append(there[0])

    @invariant()
    def sizes_agree(self) -> None:
        stats = self.store.stats()
        assert stats.entries == len(self.store) == len(self.expected)
        assert stats.used_bytes == sum(e[1] for e in self.expected) <= stats.capacity_bytes


TestModel = Model.TestCase
