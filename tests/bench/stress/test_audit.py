from pathlib import Path

import pytest
import torch

from vlcache_fx.bench.stress.audit import AuditedStore, Ledger
from vlcache_fx.bench.stress.faulty_store import FaultyStore
from vlcache_fx.bench.stress.settings import FaultRates
from vlcache_fx.store import Entry, MemoryStore


def entry(value: float) -> Entry:
    return Entry({"a": torch.full((3,), value)}, {})


@pytest.fixture
def inner() -> MemoryStore:
    return MemoryStore(1000)


def test_audit_knows_what_was_put(inner: MemoryStore, tmp_path: Path) -> None:
    store = AuditedStore(inner, Ledger(tmp_path / "ledger"))
    store.put("k", entry(1.0))
    store.put("k", entry(2.0))
    assert store.get("k") is not None
    assert store.get("missing") is None
    inner.put("k", entry(1.0))  # an earlier value of this key
    store.get("k")
    assert store.wrong_keys() == []


def test_audit_finds_other_bytes_and_other_keys(inner: MemoryStore, tmp_path: Path) -> None:
    store = AuditedStore(inner, Ledger(tmp_path / "ledger"))
    store.put("k", entry(1.0))
    inner.put("k", entry(3.0))
    inner.put("other", entry(1.0))
    store.get("k")
    store.get("other")
    assert store.wrong_keys() == ["k", "other"]
    assert store.wrong_keys() == []


def test_audit_reads_what_other_processes_put(inner: MemoryStore, tmp_path: Path) -> None:
    store = AuditedStore(inner, Ledger(tmp_path / "ledger"))
    AuditedStore(inner, Ledger(tmp_path / "ledger")).put("k", entry(4.0))
    store.get("k")
    assert store.wrong_keys() == []


def test_audit_lets_damaged_entries_pass(inner: MemoryStore, tmp_path: Path) -> None:
    damaged = FaultyStore(inner, 0, FaultRates(0, 0, 0, 0, late_damage=1), [].append)
    store = AuditedStore(damaged, Ledger(tmp_path / "ledger"))
    inner.put("k", entry(1.0))
    assert store.get("k") is not None
    assert store.wrong_keys() == []
