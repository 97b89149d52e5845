"""Tiers as one store: what is written down, promoted, cleared, and what failures cost."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.clock import Clock
from tests.store.tiers import OTHER, TENANT, SlowStore, entry, key, mark
from vlcache_fx.errors import DamagedEntryError, StoreClosedError, StoreError
from vlcache_fx.keys.entry_key import Selection
from vlcache_fx.store import Entry, HostStore, MemoryStore, Store, TieredStore
from vlcache_fx.store.recheck import RECHECK_S, Recheck

TIMEOUT_S = 60.0


@pytest.fixture
def slow() -> SlowStore:
    return SlowStore()


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore(100)


@pytest.fixture
def tiered(memory: MemoryStore, slow: SlowStore) -> Iterator[TieredStore]:
    store = TieredStore([memory, slow], close_timeout_s=TIMEOUT_S)
    yield store
    slow.gate.set()
    store.close()


def hold(slow: SlowStore, store: Store) -> None:
    """Let the slow tier's next write, of key 99, hang until its gate opens: later writes stay queued."""
    slow.gate.clear()
    slow.writing.clear()
    store.put(key(99), entry(1))
    assert slow.writing.wait(TIMEOUT_S)


def release(slow: SlowStore, store: Store) -> None:
    slow.gate.set()
    assert store.flush(TIMEOUT_S)


def test_put_reaches_all_tiers(tiered: TieredStore, memory: MemoryStore, slow: SlowStore) -> None:
    assert tiered.put(key(1), entry(10, 7))
    assert mark(memory.get(key(1))) == 7
    assert tiered.flush(TIMEOUT_S)
    assert mark(slow.get(key(1))) == 7
    assert tiered.stats().write_downs == 1


def test_put_does_not_wait_for_a_write(tiered: TieredStore, slow: SlowStore) -> None:
    hold(slow, tiered)
    for number in range(5):
        assert tiered.put(key(number), entry(30, number))
    assert [mark(tiered.get(key(number))) for number in range(5)] == [0, 1, 2, 3, 4]  # some are queued
    assert slow.reads == 0
    assert len(tiered) == 6
    release(slow, tiered)
    assert len(slow) == 6


def test_hit_below_is_promoted(tiered: TieredStore, memory: MemoryStore, slow: SlowStore) -> None:
    slow.memory.put(key(1), entry(10, 3))
    found = tiered.get(key(1))
    assert found is not None
    assert found.tier == "slow"
    assert mark(found) == 3
    assert tiered.flush(TIMEOUT_S)
    again = tiered.get(key(1))
    assert again is not None
    assert again.tier is None  # of the first tier, whose name the store has
    assert tiered.tier == "memory"
    stats = tiered.stats()
    assert (stats.promotions, stats.tiers[0].promotions, stats.hits, stats.misses) == (1, 1, 2, 0)
    assert slow.reads == 1
    assert slow.writes == 0


def test_promotion_does_not_wait_in_the_request(tiered: TieredStore, slow: SlowStore) -> None:
    slow.memory.put(key(1), entry(10, 3))
    hold(slow, tiered)
    found = tiered.get(key(1))
    assert found is not None
    assert slow.waits == 0  # its bytes may still arrive
    release(slow, tiered)
    assert slow.waits > 0


def test_large_entries_are_not_promoted(tiered: TieredStore, memory: MemoryStore, slow: SlowStore) -> None:
    assert tiered.put(key(1), entry(101, 3))  # too large for the first tier alone
    assert tiered.flush(TIMEOUT_S)
    assert mark(tiered.get(key(1))) == 3
    assert tiered.flush(TIMEOUT_S)
    assert (len(memory), tiered.stats().promotions) == (0, 0)


def test_put_refuses_what_fits_nowhere() -> None:
    store = TieredStore([MemoryStore(10), SlowStore(20)])
    assert not store.put(key(1), entry(21))
    assert store.stats().rejections == 1
    store.close()


def test_eviction_writes_down_what_the_queue_dropped(memory: MemoryStore, slow: SlowStore) -> None:
    store = TieredStore([memory, slow], queue_bytes=50)
    hold(slow, store)
    store.put(key(1), entry(60, 1))
    assert store.stats().queue_drops == 1
    release(slow, store)
    assert key(1) not in slow
    memory.get(key(99))
    memory.put(key(2), entry(80, 2))  # evicts 1, and then 99, for which the queue has no room
    assert store.flush(TIMEOUT_S)
    assert mark(slow.get(key(1))) == 1
    store.close()


def test_eviction_of_what_the_lower_tier_lacks() -> None:
    memory, slow = MemoryStore(100), SlowStore()
    store = TieredStore([memory, slow])
    hold(slow, store)
    slow.error = OSError(28, "No space left on device")
    store.put(key(1), entry(60, 1))
    release(slow, store)
    slow.error = None
    assert key(1) not in slow
    store.put(key(2), entry(60, 2))  # evicts both
    assert store.flush(TIMEOUT_S)
    assert mark(slow.get(key(1))) == 1
    writes = slow.writes
    store.put(key(3), entry(60, 3))  # evicts 2, which is below already
    assert store.flush(TIMEOUT_S)
    assert slow.writes == writes + 1
    store.close()


def test_newer_value_is_written_down_at_eviction(memory: MemoryStore, slow: SlowStore) -> None:
    """The queue did not take the second value, so the lower tier has the first."""
    store = TieredStore([memory, slow], queue_bytes=70)
    store.put(key(1), entry(60, 1))
    assert store.flush(TIMEOUT_S)
    hold(slow, store)
    store.put(key(2), entry(30, 2))
    store.put(key(1), entry(60, 11))
    assert store.stats().queue_drops == 1
    release(slow, store)
    assert mark(slow.get(key(1))) == 1
    for number, nbytes in ((3, 40), (4, 50)):  # evict 99 and 2, then 1
        memory.put(key(number), entry(nbytes))
        assert store.flush(TIMEOUT_S)
    assert mark(slow.get(key(1))) == 11
    store.close()


def test_three_tiers() -> None:
    memory, host, slow = MemoryStore(50), HostStore(100), SlowStore()
    store = TieredStore([memory, host, slow])
    for number in range(4):
        store.put(key(number), entry(40, number))
        assert store.flush(TIMEOUT_S)
    tiers = {info.key: info.tier for info in store.entries()}
    assert [tiers[key(number)] for number in range(4)] == ["slow", "slow", "host", "memory"]
    assert [info.tier for info in store.entries()] == ["slow", "slow", "host", "memory"]
    found = store.get(key(2))
    assert found is not None
    assert found.tier == "host"
    assert store.flush(TIMEOUT_S)
    assert key(2) in memory
    store.get(key(0))
    assert store.flush(TIMEOUT_S)
    assert key(0) in memory
    assert key(0) in host
    assert store.stats().tier == "memory, host, slow"
    store.close()


def test_slow_tier_alone(slow: SlowStore) -> None:
    store = TieredStore([slow])
    assert store.tier == "slow"
    hold(slow, store)
    assert store.put(key(1), entry(10, 5))
    found = store.get(key(1))
    assert found is not None
    assert found.tier == "memory"
    assert mark(found) == 5
    assert key(1) in store
    release(slow, store)
    found = store.get(key(1))
    assert found is not None
    assert found.tier == "slow"
    store.close()


def test_clear_drops_queued_and_running_writes(
    tiered: TieredStore, memory: MemoryStore, slow: SlowStore
) -> None:
    hold(slow, tiered)
    tiered.put(key(1), entry(10, 1))
    tiered.put(key(1, OTHER), entry(10, 2))
    clearing = threading.Thread(target=tiered.clear, args=(Selection(salt=TENANT.salt),))
    clearing.start()
    while memory.stats().removals < 2:
        time.sleep(0.001)
    assert tiered.get(key(99)) is None  # though its write is still in progress
    assert tiered.get(key(1)) is None
    assert key(99) not in tiered
    slow.gate.set()
    clearing.join(TIMEOUT_S)
    assert not clearing.is_alive()
    assert tiered.flush(TIMEOUT_S)
    assert [info.key for info in tiered.entries()] == [key(1, OTHER)]
    assert mark(tiered.get(key(1, OTHER))) == 2


def test_clear_does_not_wait_for_ever(memory: MemoryStore, slow: SlowStore) -> None:
    store = TieredStore([memory, slow], close_timeout_s=0.05)
    hold(slow, store)
    assert store.clear() == 1
    assert store.get(key(99)) is None
    release(slow, store)  # the write ends after the clear, and is undone
    assert len(slow) == 0
    store.close()


def test_clear_counts_distinct_keys(tiered: TieredStore, slow: SlowStore) -> None:
    tiered.put(key(1), entry(10))
    tiered.put(key(2, OTHER), entry(10))
    assert tiered.flush(TIMEOUT_S)
    slow.memory.put(key(3), entry(10))
    assert tiered.clear(Selection(key=key(2, OTHER))) == 1
    assert tiered.clear() == 2
    assert tiered.evicted(key(1)) is not None
    assert len(tiered) == len(slow) == 0


def test_clear_raises_where_a_tier_fails(tiered: TieredStore, memory: MemoryStore, slow: SlowStore) -> None:
    tiered.put(key(1), entry(10))
    assert tiered.flush(TIMEOUT_S)
    slow.error = OSError("input/output error")
    with pytest.raises(StoreError, match="could not be cleared: input/output error"):
        tiered.clear()
    assert len(memory) == 0
    slow.error = None


def test_promotion_brings_nothing_back(memory: MemoryStore, slow: SlowStore) -> None:
    """An entry that is cleared, or replaced, while its promotion waits or reads."""
    store = TieredStore([memory, slow])
    for action, left in ((store.clear, None), (lambda: store.put(key(1), entry(10, 2)), 2)):
        slow.memory.put(key(1), entry(10, 1))
        reading, go_on = threading.Event(), threading.Event()

        def arrive(reading: threading.Event = reading, go_on: threading.Event = go_on) -> None:
            reading.set()
            assert go_on.wait(TIMEOUT_S)

        slow._arrive = arrive  # type: ignore[method-assign]
        assert store.get(key(1)) is not None
        assert reading.wait(TIMEOUT_S)
        acting = threading.Thread(target=action)
        acting.start()
        while not store._queue.is_cancelled(key(1)):
            time.sleep(0.001)
        go_on.set()
        acting.join(TIMEOUT_S)
        assert store.flush(TIMEOUT_S)
        assert mark(memory.get(key(1))) == left
        assert mark(slow.memory.get(key(1))) == left
    store.close()


def test_late_eviction_of_a_cleared_entry(memory: MemoryStore, slow: SlowStore) -> None:
    """A put evicts an entry; before that is written down, the entry is cleared."""
    store = TieredStore([memory, slow])
    store.put(key(1), entry(60, 1))
    assert store.flush(TIMEOUT_S)

    def clear(evicted: str, dropped: Entry) -> None:
        store.clear(Selection(key=evicted))

    listeners = memory._listeners
    memory._listeners = (clear, *listeners)
    store.put(key(2), entry(60, 2))
    assert store.flush(TIMEOUT_S)
    assert key(1) not in slow
    assert key(2) in slow
    store.close()


@pytest.mark.parametrize("error", [StoreError("broken"), OSError(5, "Input/output error")])
def test_failures_of_a_lower_tier(
    tiered: TieredStore, slow: SlowStore, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    slow.error = error
    with caplog.at_level(logging.WARNING, "vlcache_fx"):
        for number in range(3):
            assert tiered.put(key(number), entry(10, number))
            assert tiered.get(key(number + 10)) is None
            assert key(number + 10) not in tiered
        assert tiered.flush(TIMEOUT_S)
    assert mark(tiered.get(key(1))) == 1
    assert tiered.stats().failures == 9
    assert tiered.stats().tiers[1].failures == 9
    assert len(caplog.records) == 2  # read and write
    slow.error = None
    assert tiered.put(key(7), entry(10))
    assert tiered.flush(TIMEOUT_S)
    assert key(7) in slow


def test_other_errors_do_not_end_the_thread(tiered: TieredStore, slow: SlowStore) -> None:
    slow.error = RuntimeError("CUDA error")
    tiered.put(key(1), entry(10))
    assert tiered.flush(TIMEOUT_S)
    slow.error = None
    tiered.put(key(2), entry(10))
    assert tiered.flush(TIMEOUT_S)
    assert key(2) in slow
    assert tiered.stats().failures == 1


def test_damaged_entry_is_not_promoted(tiered: TieredStore, memory: MemoryStore, slow: SlowStore) -> None:
    def arrive() -> None:
        raise DamagedEntryError("flipped bytes")

    slow.memory.put(key(1), entry(10, 1))
    slow._arrive = arrive  # type: ignore[method-assign]
    assert tiered.get(key(1)) is not None
    assert tiered.flush(TIMEOUT_S)
    assert key(1) not in memory
    assert tiered.stats().failures == 1


def test_contains_asks_no_remote_tier(memory: MemoryStore) -> None:
    remote = SlowStore(is_local=False)
    remote.error = StoreError("asked")
    store = TieredStore([memory, remote])
    assert key(1) not in store
    assert store.stats().failures == 0
    remote.error = None
    store.close()


def test_close_is_bounded_and_final(memory: MemoryStore, slow: SlowStore) -> None:
    store = TieredStore([memory, slow])
    hold(slow, store)
    store.put(key(1), entry(10))
    store.close(0.05)
    store.close()
    assert store.stats().queue_drops == 1
    calls: list[Callable[[], object]] = [
        lambda: store.get(key(1)),
        lambda: store.put(key(1), entry(1)),
        lambda: key(1) in store,
        lambda: len(store),
        store.clear,
        lambda: store.evicted(key(1)),
    ]
    for call in calls:
        with pytest.raises(StoreClosedError):
            call()
    slow.gate.set()
    assert store.flush(TIMEOUT_S)


def test_close_drains(memory: MemoryStore) -> None:
    written: list[str] = []

    class Folder(SlowStore):
        def put(self, key: str, entry: Entry) -> bool:
            written.append(key)
            return super().put(key, entry)

    store = TieredStore([memory, Folder()])
    for number in range(5):
        store.put(key(number), entry(1))
    store.close(TIMEOUT_S)
    assert written == [key(number) for number in range(5)]


def test_tiers_must_be_distinct(memory: MemoryStore) -> None:
    for tiers in ([], [memory, memory]):
        with pytest.raises(StoreError, match="each given once"):
            TieredStore(tiers)


@pytest.mark.gpu
def test_device_entries_are_written_down() -> None:
    memory, slow = MemoryStore(1 << 20), SlowStore()
    store = TieredStore([memory, HostStore(1 << 20), slow])
    rows = torch.randn(256, 128, device="cuda")
    store.put(key(1), Entry({"rows": rows}, {}))
    assert store.flush(TIMEOUT_S)
    found = slow.memory.get(key(1))
    assert found is not None
    assert torch.equal(found.tensors["rows"].cpu(), rows.cpu())
    store.close()


@pytest.mark.parametrize("seed", [0, 1])
def test_threads_under_pressure(seed: int) -> None:
    """Small bounds, many threads, clears at any time: bounds hold, values are right, nothing comes back."""
    memory, slow = MemoryStore(120), SlowStore(400)
    store = TieredStore([memory, slow], queue_bytes=150, queue_entries=6, close_timeout_s=TIMEOUT_S)
    rounds, workers = 5, 6
    wrong: list[object] = []
    stop = threading.Event()
    sampled = [0, 0, 0]
    scopes = (TENANT, OTHER)
    keys = {(number, scope): key(number, scope) for number in range(12) for scope in scopes}
    names = {name: (number, scope) for (number, scope), name in keys.items()}

    def check(name: str, found: Entry | None) -> None:
        number, scope = names[name]
        if found is not None and (mark(found) or 0) % 100 != number + 50 * (scope is OTHER):
            wrong.append((name, found.info))

    def work(thread: int, round_: int) -> None:
        chance = random.Random(1000 * seed + 10 * thread + round_)
        try:
            for _ in range(60):
                name = chance.choice(list(names))
                number, scope = names[name]
                value = 100 * chance.randrange(50) + number + 50 * (scope is OTHER)
                action = chance.random()
                if action < 0.5:
                    check(name, store.get(name))
                elif action < 0.95:
                    store.put(name, entry(chance.choice((10, 30, 60)), value, cost_ms=chance.random()))
                elif action < 0.98:
                    store.clear(Selection(salt=chance.choice(scopes).salt))
                else:
                    store.clear()
        except BaseException as error:
            wrong.append(error)
            raise

    def sample() -> None:
        while not stop.wait(0.0005):
            sizes = memory.stats().used_bytes, slow.stats().used_bytes, store._queue.used_bytes
            sampled[:] = map(max, sampled, sizes)

    sampler = threading.Thread(target=sample)
    sampler.start()
    for round_ in range(rounds):
        threads = [threading.Thread(target=work, args=(thread, round_)) for thread in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert not any(thread.is_alive() for thread in threads)
        store.clear(Selection(salt=TENANT.salt))
        left = {info.key for info in store.entries()}
        assert store.flush(TIMEOUT_S)
        for name, (_, scope) in names.items():
            if scope is TENANT:
                assert store.get(name) is None
            elif name in left:
                check(name, store.get(name))
        assert store.flush(TIMEOUT_S)
        assert not any(
            scope is TENANT for name, (_, scope) in names.items() if name in memory or name in slow
        )
    stop.set()
    sampler.join()
    stats = store.stats()
    store.close()
    assert not wrong
    assert sampled[0] <= 120
    assert sampled[1] <= 400
    assert sampled[2] <= 150
    assert stats.failures == 0
    assert min(stats.promotions, stats.write_downs, stats.queue_drops) > 0


@pytest.fixture
def clock(tiered: TieredStore) -> Clock:
    clock = Clock()
    tiered._recheck = Recheck(clock)
    return clock


def donor(mark: int, contexts: int) -> Entry:
    return entry(10, mark, contexts=[str(number) for number in range(contexts)])


def test_donor_that_another_process_refined(
    tiered: TieredStore, memory: MemoryStore, slow: SlowStore, clock: Clock
) -> None:
    """It replaces the one in memory, in the background, once it was looked up again."""
    tiered.put(key(1), donor(1, 1))
    assert mark(tiered.get(key(1))) == 1
    assert tiered.flush(TIMEOUT_S)
    slow.memory.put(key(1), donor(2, 3))
    assert mark(tiered.get(key(1))) == 1
    assert tiered.flush(TIMEOUT_S)
    assert mark(memory.get(key(1))) == 1  # not yet due
    clock.now += RECHECK_S
    assert mark(tiered.get(key(1))) == 1
    assert tiered.flush(TIMEOUT_S)
    assert mark(tiered.get(key(1))) == 2
    assert tiered.stats().promotions == 1


@pytest.mark.parametrize("contexts", [0, 1, 2])
def test_donor_that_is_no_better_stays(
    tiered: TieredStore, slow: SlowStore, clock: Clock, contexts: int
) -> None:
    tiered.put(key(1), donor(1, 2))
    tiered.get(key(1))
    assert tiered.flush(TIMEOUT_S)
    slow.memory.put(key(1), donor(2, contexts))
    clock.now += RECHECK_S
    tiered.get(key(1))
    assert tiered.flush(TIMEOUT_S)
    assert mark(tiered.get(key(1))) == 1


def test_search_for_a_better_donor_brings_nothing_back(
    tiered: TieredStore, memory: MemoryStore, slow: SlowStore, clock: Clock
) -> None:
    """Nor does it replace what was stored while it searched."""
    tiered.put(key(1), donor(1, 1))
    tiered.get(key(1))
    assert tiered.flush(TIMEOUT_S)
    slow.memory.put(key(1), donor(2, 3))
    clock.now += RECHECK_S
    hold(slow, tiered)
    tiered.get(key(1))  # queues the search
    tiered.clear(Selection(key=key(1)))
    release(slow, tiered)
    assert key(1) not in memory


def test_other_entries_are_not_looked_up_again(tiered: TieredStore, slow: SlowStore, clock: Clock) -> None:
    tiered.put(key(1), entry(10, 1))
    for _ in range(3):
        clock.now += RECHECK_S
        tiered.get(key(1))
    assert tiered.flush(TIMEOUT_S)
    assert slow.reads == 0


def test_failing_search_costs_nothing(tiered: TieredStore, slow: SlowStore, clock: Clock) -> None:
    tiered.put(key(1), donor(1, 1))
    tiered.get(key(1))
    assert tiered.flush(TIMEOUT_S)
    clock.now += RECHECK_S
    slow.error = StoreError("gone")
    assert mark(tiered.get(key(1))) == 1
    assert tiered.flush(TIMEOUT_S)
    assert mark(tiered.get(key(1))) == 1
