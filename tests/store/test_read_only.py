"""A store that is read but not written to."""

from __future__ import annotations

import torch

from vlcache_fx.store import Entry, MemoryStore
from vlcache_fx.store.read_only import ReadOnlyStore


def test_read_only_store() -> None:
    store = MemoryStore(1 << 20)
    store.put("a", Entry({"x": torch.ones(4)}, {"kind": "donor"}))
    view = ReadOnlyStore(store)
    assert view.put("b", Entry({"x": torch.ones(4)}, {}))
    assert ("a" in view, "b" in view, len(view)) == (True, False, 1)
    assert view.get("b") is None
    found = view.get("a")
    assert found is not None
    assert torch.equal(found.tensors["x"], torch.ones(4))
    assert view.info_of("a") == {"kind": "donor"}
    assert [entry.key for entry in view.entries()] == ["a"]
    assert view.clear() == 0
    view.close()
    assert (view.tier, view.stats()) == (store.tier, store.stats())
    assert view.evicted("a") is None
    assert "a" in store
