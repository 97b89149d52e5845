from dataclasses import replace

import pytest
import torch

from vlcache_fx.bench.stress.faulty_store import FaultyStore
from vlcache_fx.bench.stress.settings import FaultRates
from vlcache_fx.errors import DamagedEntryError, OptionError, StoreError
from vlcache_fx.store import Entry, MemoryStore

QUIET = FaultRates(0, 0, 0, 0, 0, timeout_s=0)


def entry(value: float = 1.0) -> Entry:
    return Entry({"a": torch.zeros(2), "b": torch.full((3,), value)}, {"n": 1})


def faulty(rates: FaultRates, faults: list[str] | None = None) -> tuple[FaultyStore, MemoryStore]:
    inner = MemoryStore(1000)
    inner.put("kept", entry())
    return FaultyStore(inner, 0, rates, ([] if faults is None else faults).append), inner


def test_faulty_store_passes_calls_on() -> None:
    store, inner = faulty(QUIET)
    assert store.put("k", entry(2.0))
    found = store.get("k")
    assert found is not None
    assert found.tensors["b"].tolist() == [2.0] * 3
    assert store.get("missing") is None
    assert ("k" in store, len(store), [info.key for info in store.entries()]) == (True, 2, ["kept", "k"])
    assert store.stats() == inner.stats()
    assert store.flush(1.0)
    assert store.evicted("k") is None
    assert store.clear() == 2
    store.close()
    with pytest.raises(StoreError, match="closed"):
        inner.get("k")


@pytest.mark.parametrize(
    ("name", "cause", "reads", "writes"),
    [
        ("read_error", OSError, True, False),
        ("write_error", OSError, False, True),
        ("allocation", MemoryError, True, True),
        ("timeout", TimeoutError, True, True),
    ],
)
def test_faulty_store_fails(name: str, cause: type[Exception], reads: bool, writes: bool) -> None:
    faults: list[str] = []
    store, inner = faulty(replace(QUIET, **{name: 1}), faults)
    for is_faulty, call in ((reads, lambda: store.get("kept")), (writes, lambda: store.put("k", entry()))):
        if is_faulty:
            with pytest.raises(StoreError, match="injected") as caught:
                call()
            assert isinstance(caught.value.__cause__, cause)
        else:
            assert call()
    assert len(faults) == reads + writes
    assert ("k" in inner) is not writes


def test_faulty_store_late_damage() -> None:
    store, _ = faulty(replace(QUIET, late_damage=1))
    found = store.get("kept")
    assert found is not None
    assert (found.tier, found.nbytes) == ("memory", 20)
    assert found.tensors["a"].tolist() == [0.0, 0.0]
    with pytest.raises(DamagedEntryError, match="kept"):
        found.wait()


def test_fault_rates_are_shares() -> None:
    with pytest.raises(OptionError, match="timeout=2"):
        FaultRates(timeout=2)
