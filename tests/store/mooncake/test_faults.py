"""Faults to order, with an imitation of Mooncake: each is a miss or a lost write, then the store is back."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vlcache_fx.errors import DamagedEntryError, StoreClosedError, StoreError
from vlcache_fx.store import Entry, MooncakeSettings, MooncakeStore

from .conftest import Imitation


def entry(value: float = 1.0, layers: int = 3, **info: object) -> Entry:
    tensors = {f"k.{layer}": torch.full((2, 5), float(value + layer)) for layer in range(layers)}
    return Entry(tensors, info)  # type: ignore[arg-type]


def value_of(store: MooncakeStore, key: str) -> float | None:
    found = store.get(key)
    return None if found is None else float(found.tensors["k.0"][0, 0])


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_entries_come_back_as_they_were_stored(imitation: Imitation) -> None:
    store = imitation.open()
    tensors = {
        "k.0": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "empty": torch.empty(0, 7),
        "scalar": torch.tensor(5),
        "mask": torch.tensor([True, False]),
    }
    assert store.put("a", Entry(tensors, {"length": 3}))
    found = store.get("a")
    assert found is not None
    assert found.tier == "mooncake"
    assert found.info == {"length": 3}
    assert list(found.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert found.peek(name).dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert store.get("b") is None
    assert "a" in store
    assert "b" not in store
    stats = store.stats()
    assert (stats.entries, stats.hits, stats.misses, stats.admissions) == (1, 1, 1, 1)
    assert stats.used_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_entry_without_bytes(imitation: Imitation) -> None:
    store = imitation.open()
    assert store.put("a", Entry({}, {"n": 1}))
    found = store.get("a")
    assert found is not None
    assert dict(found.tensors) == {}
    assert found.info == {"n": 1}


@pytest.mark.parametrize("operation", ["exists", "read", "write"])
@pytest.mark.parametrize("kind", ["hang", "exit", "-900"])
def test_faults_cost_reuse_and_pass(
    imitation: Imitation, operation: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = imitation.open(transfer_ms=10_000)
    assert store.put("a", entry(1.0))
    quick = store if kind != "hang" else imitation.open(timeout_ms=50, transfer_ms=50)
    imitation.fault(operation, kind)
    with caplog.at_level(logging.WARNING, "vlcache_fx"):
        if operation == "write":
            with pytest.raises(StoreError):
                quick.put("b", entry(2.0))
        else:
            assert quick.get("a") is None
    assert quick.stats().failures == 1
    assert len(caplog.records) == 1
    assert "going on without it" in caplog.text
    imitation.heal()
    # The tier is back by itself; a busy machine may take longer than 50 ms, so the other store looks.
    assert eventually(lambda: quick._link.client() is not None)
    assert value_of(store if kind == "hang" else quick, "a") == 1.0


def test_a_tier_that_rests_answers_at_once(imitation: Imitation) -> None:
    store = imitation.open(timeout_ms=50)
    imitation.fault("exists", "hang")
    imitation.fault("setup", "hang")
    assert store.get("a") is None
    assert store._link.client() is None
    assert store.get("a") is None
    with pytest.raises(StoreError, match="rests after a failure"):
        store.put("a", entry())
    assert "a" not in store
    assert store.stats().failures == 1
    with pytest.raises(StoreError, match="rests after a failure"):
        store.clear()


def test_rests_grow_with_failures_in_a_row(imitation: Imitation) -> None:
    store = imitation.open(timeout_ms=5000)
    link = store._link
    rests = [link._take_rest() for _ in range(12)]
    assert rests == [min(0.05 * 2**index, 30.0) for index in range(12)]
    assert store.get("a") is None
    assert link._take_rest() == 0.05


def test_a_full_store_is_tried_again(imitation: Imitation) -> None:
    store = imitation.open()
    imitation.fault("write", "-200")  # once
    assert store.put("a", entry(4.0))
    assert value_of(store, "a") == 4.0
    assert store.stats().failures == 0


def test_entry_larger_than_the_bound_or_the_buffer(imitation: Imitation) -> None:
    store = imitation.open(capacity_bytes=100)
    assert not store.put("a", entry())  # never fits, so it is no failure
    assert store.stats().rejections == 1
    assert not list(imitation.folder.glob("*.a.*"))
    small = imitation.open(buffer_bytes=1 << 20)
    assert not small.put("a", Entry({"k": torch.zeros(1 << 19)}, {}))


def test_bound_of_what_a_client_writes(imitation: Imitation) -> None:
    one = entry().nbytes
    store = imitation.open(capacity_bytes=3 * one)
    for index in range(5):
        assert store.put(f"key{index}", entry(index))
        assert store.stats().used_bytes <= 3 * one
        assert value_of(store, "key0" if index < 4 else "key4") is not None  # key0 is used, so it stays
    assert [info.key for info in store.entries()] == ["key3", "key0", "key4"]
    assert store.stats().evictions == 2
    assert len(list(imitation.folder.glob("vlcache1.*"))) == 3
    assert len(list(imitation.folder.glob("vlcache1p.*"))) == 9


def test_changed_bytes_are_a_miss_logged_once_and_removed(
    imitation: Imitation, caplog: pytest.LogCaptureFixture
) -> None:
    store = imitation.open()
    assert store.put("a", entry(1.0))
    (part,) = imitation.folder.glob("vlcache1p.a.*.1")
    data = bytearray(part.read_bytes())
    data[0] ^= 1
    part.write_bytes(data)
    found = store.get("a")
    assert found is not None
    with pytest.raises(DamagedEntryError, match=r"'k.1' are not those that were stored"):
        found.wait()
    assert eventually(lambda: not list(imitation.folder.glob("*.a.*")))
    assert store.get("a") is None
    assert store.stats().damaged == 1
    assert len(caplog.records) == 1


@pytest.mark.parametrize("change", ["truncate", "lengthen", "vanish", "swap"])
def test_parts_of_another_size_or_entry(imitation: Imitation, change: str) -> None:
    store = imitation.open()
    assert store.put("a", entry(1.0))
    assert store.put("b", entry(2.0))
    (part,) = imitation.folder.glob("vlcache1p.a.*.0")
    data = part.read_bytes()
    if change == "swap":
        (other,) = imitation.folder.glob("vlcache1p.b.*.0")
        part.write_bytes(other.read_bytes())
    elif change == "vanish":
        part.unlink()
    else:
        part.write_bytes(data[:-1] if change == "truncate" else data + b"x")
    found = store.get("a")
    assert found is not None
    with pytest.raises(DamagedEntryError):
        found.wait()
    assert eventually(lambda: "a" not in store)
    assert value_of(store, "b") == 2.0
    assert store.stats().failures == 0


def test_a_large_or_foreign_manifest_is_a_miss_and_hides_nothing(imitation: Imitation) -> None:
    store = imitation.open()
    assert store.put("a", entry(1.0, contexts=["x"]))
    (imitation.folder / "vlcache1.a.2").write_bytes(b"planted")
    (imitation.folder / "vlcache1.a.3").write_bytes(b"x" * (2 << 20))
    assert value_of(store, "a") == 1.0
    assert sorted(path.name for path in imitation.folder.glob("vlcache1.*")) == ["vlcache1.a.1"]


def test_tensors_stay_valid_after_a_failure(imitation: Imitation) -> None:
    store = imitation.open()
    assert store.put("a", entry(7.0))
    found = store.get("a")
    assert found is not None
    found.wait()
    imitation.fault("exists", "-900")
    assert store.get("a") is None
    assert eventually(lambda: value_of(store, "a") == 7.0)
    store.close()
    assert float(found.tensors["k.2"][0, 0]) == 9.0


def test_closed_stores_refuse(imitation: Imitation) -> None:
    store = imitation.open()
    store.close()
    store.close()
    for call in (lambda: store.get("a"), lambda: store.put("a", entry()), store.clear, lambda: len(store)):
        with pytest.raises(StoreClosedError):
            call()
    assert store.stats().tier == "mooncake"


def test_package_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StoreError, match=r"vlcache_fx\[mooncake\].*mooncake-cpu.*libibverbs1"):
        MooncakeStore(MooncakeSettings("127.0.0.1", 9, secret_file=tmp_path / "secret"), 1)


def test_library_is_missing(imitation: Imitation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "broken" / "mooncake"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "store.py").write_text("raise ImportError('libibverbs.so.1: cannot open')")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "mooncake", raising=False)
    with pytest.raises(StoreError, match=r"libibverbs.so.1: cannot open.*is it installed.*libibverbs1"):
        imitation.open()


@pytest.mark.parametrize("operation", ["setup", "register"])
def test_setup_fails(imitation: Imitation, operation: str) -> None:
    imitation.fault(operation, "-1")
    with pytest.raises(StoreError, match=r"cannot connect to Mooncake at 127.0.0.1:.* returned -1"):
        imitation.open()


def test_capacity_must_be_positive(imitation: Imitation) -> None:
    with pytest.raises(StoreError, match="must be positive"):
        imitation.open(capacity_bytes=0)
