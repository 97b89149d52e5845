"""The memory store: bounded, cheapest first, thread-safe."""

import threading
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vlcache_fx.errors import DamagedEntryError, StoreError
from vlcache_fx.keys.entry_key import KeyScope, Selection
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


def test_put_evicts_what_is_cheapest_to_compute_again() -> None:
    store = MemoryStore(10)
    for key, cost_ms in (("a", 9.0), ("b", 1.0), ("c", 5.0)):
        store.put(key, Entry({"x": torch.zeros(3, dtype=torch.uint8)}, {"cost_ms": cost_ms}))
    assert [info.key for info in store.entries()] == ["b", "c", "a"]
    store.put("d", entry(3))
    assert "b" not in store
    assert "a" in store


def test_evictions_are_remembered() -> None:
    store = MemoryStore(10)
    store.put("a", entry(6))
    store.put("b", entry(7))
    eviction = store.evicted("a")
    assert eviction is not None
    assert (eviction.tier, eviction.cause, eviction.nbytes, eviction.for_key) == (
        "memory",
        "capacity",
        6,
        "b",
    )
    assert store.evicted("b") is None
    store.clear()
    cleared = store.evicted("b")
    assert cleared is not None
    assert (cleared.cause, cleared.for_key) == ("cleared", "")
    assert cleared.evicted_at >= eviction.evicted_at
    store.put("a", entry(1))
    assert store.evicted("a") is None


def test_clear_selection() -> None:
    store = MemoryStore(100)
    tenants = [KeyScope(salt, "model") for salt in ("one", "two")]
    keys = [tenant.key("donor", {"content": number}) for tenant in tenants for number in range(3)]
    for key in keys:
        store.put(key, entry(1))
    assert store.clear(Selection(salt="one")) == 3
    assert [key in store for key in keys] == [False] * 3 + [True] * 3
    assert store.clear(Selection(key=keys[3])) == 1
    assert store.stats().removals == 4


def test_listeners_hear_of_evictions() -> None:
    store = MemoryStore(10)
    heard: list[tuple[str, int]] = []

    def listener(key: str, evicted: Entry) -> None:
        assert key not in store  # no lock is held
        heard.append((key, evicted.nbytes))

    stop = store.on_evict(listener)
    for key in "abc":
        store.put(key, entry(5))
    store.clear()
    assert heard == [("a", 5)]
    stop()
    for key in "abc":
        store.put(key, entry(5))
    assert heard == [("a", 5)]


class Pending:
    """An entry of a slow tier whose tensor arrives when ``gate`` opens."""

    def __init__(self, nbytes: int, mark: int = 0) -> None:
        self.gate, self.waiting = threading.Event(), threading.Event()
        self.error: Exception | None = None
        storage = torch.full((2 * nbytes,), mark, dtype=torch.uint8)
        self.entry = Entry.pending({"x": storage[:nbytes]}, {"mark": mark}, {"x": self.wait}, "slow")

    def wait(self) -> None:
        self.waiting.set()
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error


def test_put_copies_entries_that_arrive() -> None:
    store, pending = MemoryStore(10), Pending(4, 7)
    pending.gate.set()
    assert store.put("a", pending.entry)
    found = store.get("a")
    assert found is not None
    assert found.tier is None
    assert found.wait_of("x") is None
    assert found.tensors["x"].untyped_storage().nbytes() == 4
    assert found.tensors["x"].tolist() == [7] * 4
    assert not store.put("b", Pending(11).entry)  # too large: nothing is waited for


def test_room_is_made_before_a_copy() -> None:
    store, pending = MemoryStore(10), Pending(6)
    store.put("old", entry(6))
    thread = threading.Thread(target=store.put, args=("a", pending.entry))
    thread.start()
    assert pending.waiting.wait(60)
    assert (len(store), store.stats().used_bytes) == (0, 6)
    store.put("b", entry(4))  # fits beside the copy
    blocked = threading.Thread(target=store.put, args=("c", entry(5)))
    blocked.start()
    pending.gate.set()
    for one in (thread, blocked):
        one.join(60)
        assert not one.is_alive()
    assert "c" in store
    assert store.stats().used_bytes <= 10


@pytest.mark.parametrize("event", ["clear", "put", "close", "damage"])
def test_copy_that_is_void_is_not_stored(event: str) -> None:
    store, pending = MemoryStore(20), Pending(6, 1)
    failures: list[StoreError] = []

    def put() -> None:
        try:
            store.put("a", pending.entry)
        except StoreError as error:
            failures.append(error)

    thread = threading.Thread(target=put)
    thread.start()
    assert pending.waiting.wait(60)
    if event == "clear":
        store.clear()
    elif event == "put":
        store.put("a", entry(5, 2))
    elif event == "close":
        store.close()
    else:
        pending.error = DamagedEntryError("flipped bytes")
    pending.gate.set()
    thread.join(60)
    assert len(failures) == (event == "damage")
    assert store.stats().used_bytes == (5 if event == "put" else 0)
    if event == "put":
        found = store.get("a")
        assert found is not None
        assert found.info["mark"] == 2


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
        assert [info.key for info in self.store.entries()] == [e[0] for e in self.expected]


TestModel = Model.TestCase


class WeightedModel(RuleBasedStateMachine):
    """The store with costs: bounds, sizes and values."""

    keys = st.sampled_from("abcde")

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore(20)
        self.latest: dict[str, int] = {}
        self.step = 0

    @rule(key=keys, size=st.integers(0, 22), cost_ms=st.sampled_from([None, 0.0, 1.0, 100.0]))
    def put(self, key: str, size: int, cost_ms: float | None) -> None:
        self.step += 1
        info = {"mark": self.step} | ({} if cost_ms is None else {"cost_ms": cost_ms})
        if self.store.put(key, Entry({"x": torch.zeros(size, dtype=torch.uint8)}, info)):
            self.latest[key] = self.step

    @rule(key=keys)
    def get(self, key: str) -> None:
        found = self.store.get(key)
        assert found is None or found.info["mark"] == self.latest[key]
        assert found is not None or key not in self.latest or self.store.evicted(key) is not None

    @rule()
    def clear(self) -> None:
        self.store.clear()
        assert self.store.stats().used_bytes == 0

    @invariant()
    def sizes_agree(self) -> None:
        infos = list(self.store.entries())
        assert sum(info.nbytes for info in infos) == self.store.stats().used_bytes <= 20
        assert len(infos) == len(self.store) == self.store.stats().entries


TestWeightedModel = WeightedModel.TestCase
