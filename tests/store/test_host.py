"""The host tier, with and without a GPU."""

from __future__ import annotations

import pytest
import torch

from vlcache_fx.store import Entry, HostStore, host, open_store


def test_host_store_by_url() -> None:
    store = open_store("host://", 1000)
    assert isinstance(store, HostStore)
    assert store.tier == "host"
    assert store.stats().capacity_bytes == 1000


def test_put_keeps_host_entries_unchanged() -> None:
    store = HostStore(1 << 20)
    entry = Entry({"rows": torch.arange(6.0)}, {"kind": "donor"})
    assert store.put("key", entry)
    assert store.get("key") is entry
    assert store.get("other") is None


def test_put_rejects_large_entries() -> None:
    store = HostStore(8)
    assert not store.put("key", Entry({"rows": torch.arange(6.0)}, {}))
    assert store.stats().rejections == 1


@pytest.mark.gpu
def test_put_moves_device_entries_to_pinned_memory() -> None:
    store = HostStore(1 << 20)
    rows = torch.randn(64, 32, device="cuda")
    store.put("key", Entry({"rows": rows}, {"kind": "donor"}))
    found = store.get("key")
    assert found is not None
    assert found.tensors["rows"].is_pinned()
    assert torch.equal(found.tensors["rows"], rows.cpu())
    assert found.info["kind"] == "donor"
    assert store.stats().used_bytes == rows.numel() * 4


def test_room_is_made_before_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of a GPU's entry, stood in for by one of host memory."""
    store = HostStore(100)
    store.put("old", Entry({"rows": torch.zeros(60, dtype=torch.uint8)}, {}))
    entry = Entry({"rows": torch.ones(80, dtype=torch.uint8)}, {})
    seen: list[tuple[int, int]] = []

    def on_host(copied: Entry) -> Entry:
        seen.append((len(store), store.stats().used_bytes))
        return copied

    monkeypatch.setattr(host, "_on_device", lambda copied: copied is entry)
    monkeypatch.setattr(host, "_on_host", on_host)
    assert store.put("new", entry)
    assert seen == [(0, 80)]
    assert store.get("new") is entry
