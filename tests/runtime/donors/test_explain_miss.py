"""Explanations of misses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vlcache_fx.errors import Reason, StoreError
from vlcache_fx.keys.entry_key import EntryKey, KeyScope, Selection, salt_tag
from vlcache_fx.runtime.donors.explain_miss import MissExplanation, explain_key
from vlcache_fx.store import Entry, MemoryStore
from vlcache_fx.store.base import Eviction
from vlcache_fx.testing.families import qwen_inputs, tiny_qwen2_5_vl
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..helpers import Pair, settings_of, with_api, with_backend

ONE, TWO = (40, 0), (24, 1)


class Remembering(MemoryStore):
    """Remembers evictions by hand, and counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__(1 << 24)
        self.dropped: dict[str, Eviction] = {}
        self.listings = 0

    def evict(self, key: str, cause: str = "capacity") -> None:
        self.clear(Selection(key=key))
        self.dropped[key] = Eviction(key, self.tier, 1e9, cause, 100, KEY)

    def evicted(self, key: str) -> Eviction | None:
        return self.dropped.get(key)

    def entries(self) -> Iterator[Any]:
        self.listings += 1
        return super().entries()


def key_of(content: str = "c", salt: str = "", model: str = "0" * 64, **parts: str) -> EntryKey:
    return KeyScope(salt, model).key("donor", {"content": content, "weights": model, **parts})


KEY = str(key_of())


def put(store: MemoryStore, key: EntryKey, **notes: str) -> None:
    store.put(key, Entry({"k": torch.zeros(2)}, {"parts": dict(key.parts), "notes": notes}))


def ask(pair: Pair, *images: tuple[int, int], text_seed: int = 0) -> tuple[Any, tuple[MissExplanation, ...]]:
    """Return the report of a prompt with these images, and the explanations of its misses."""
    _, report = pair.run(**tiny_vlm_inputs(5, 6, images, text_seed=text_seed))
    return report, pair.engine.explain_miss()


@pytest.fixture
def pair() -> Pair:
    return with_backend(tiny_vlm(last_only=False), budget=0.1, store=Remembering())


# Keys alone, as ``vlcache store why`` explains them ---------------------------------------------------------


def test_stored_key() -> None:
    store = MemoryStore(1 << 20)
    put(store, key_of())
    found = explain_key(KEY, store)
    assert (found.reason, found.differs, str(found)) == (None, (), f"donor {KEY[-64:-52]} is stored.")


def test_key_in_an_empty_store() -> None:
    found = explain_key(KEY, MemoryStore(1 << 20))
    assert (found.reason, found.nearest) == (Reason.NEW_ITEM, None)
    assert explain_key("nonsense", MemoryStore(1 << 20)).nearest is None


def test_evicted_key() -> None:
    store = Remembering()
    store.evict(KEY)
    found = explain_key(KEY, store)
    assert found.reason is Reason.EVICTED
    assert found.eviction is not None
    assert found.eviction.for_key == KEY
    assert "was dropped from the memory tier at 2001-09-09 01:46:40 UTC to make room for donor" in str(found)
    assert json.loads(json.dumps(found.as_dict()))["eviction"]["cause"] == "capacity"


def test_key_alone_is_compared_by_its_tags() -> None:
    store = MemoryStore(1 << 20)
    put(store, key_of("x", salt="tenant"))
    put(store, key_of("x", model="f" * 64))
    found = explain_key(str(key_of(salt="tenant")), store)
    assert (found.nearest, found.differs) == (str(key_of("x", salt="tenant")), ())
    found = explain_key(KEY, store)
    assert found.differs in (("salt",), ("decoder weights",))


# Reports ---------------------------------------------------------------------------------------------------


def test_new_item_and_its_nearest(pair: Pair) -> None:
    assert pair.engine.explain_miss() == ()
    report, (found,) = ask(pair, ONE)
    assert (found.reason, found.nearest, found.key) == (Reason.NEW_ITEM, None, report.spans[0].key)
    assert (found.sample, found.start) == (0, 5)
    report, explained = ask(pair, ONE, text_seed=1)
    assert (report.mode, explained) == ("warm", ())
    _, (found,) = ask(pair, TWO)
    assert found.nearest is not None
    assert found.nearest_tier == "memory"
    assert any("features" in words for words in found.differs)


def test_other_weights(pair: Pair) -> None:
    first, _ = ask(pair, ONE)
    with torch.no_grad():
        for model in (pair.model, pair.reference):
            model.decoder.layers[0].mlp.up.weight.mul_(2.0)
    report, (found,) = ask(pair, ONE)
    assert (found.reason, found.differs) == (Reason.OTHER_WEIGHTS, ("decoder weights",))
    assert found.nearest == first.spans[0].key
    assert str(found).endswith("(in the memory tier), differs in: decoder weights.")
    assert report.reason == f"no donor for its spans: {Reason.OTHER_WEIGHTS.text}"


def test_salt_is_explained_but_not_reported(pair: Pair) -> None:
    ask(pair, ONE)
    with settings_of(pair.engine, salt="another"):
        report, (found,) = ask(pair, ONE)
    assert report.reason_code is report.spans[0].miss_reason is Reason.NEW_ITEM
    assert report.spans[0].miss_detail == ""
    assert (found.reason, found.differs) == (Reason.NEW_ITEM, ("salt",))


def test_evicted(pair: Pair) -> None:
    first, _ = ask(pair, ONE)
    store: Any = pair.engine.store
    store.evict(first.spans[0].key)
    listings = store.listings
    report, _ = ask(pair, ONE)
    assert report.reason == "no donor for its spans: its donor was evicted to make room (memory tier)"
    assert report.reason_code is Reason.EVICTED
    del store.dropped[first.spans[0].key]  # a store may forget once the entry is back
    (found,) = pair.engine.explain_miss(report)
    assert found.eviction is not None
    assert store.listings == listings  # neither calls nor evictions read the listing


def test_evicted_from_memory() -> None:
    store = MemoryStore(1 << 20)
    pair = with_backend(tiny_vlm(last_only=False), store=store)
    first, _ = ask(pair, ONE)
    store.put(KEY, Entry({"k": torch.zeros(1 << 18)}, {}))  # fills the store
    store.clear(Selection(key=KEY))
    report, (found,) = ask(pair, ONE)
    assert report.reason_code is Reason.EVICTED
    assert found.key == first.spans[0].key
    assert found.eviction is not None
    assert (found.eviction.cause, found.eviction.for_key) == ("capacity", KEY)
    assert KEY not in json.dumps(report.as_dict())  # it may be another tenant's


def test_entry_that_does_not_fit() -> None:
    store = MemoryStore(1 << 24)
    last = with_backend(tiny_vlm(last_only=True), store=store)
    every = with_backend(tiny_vlm(last_only=False), store=store)
    ask(last, ONE)
    report, (found,) = ask(every, ONE)
    assert found.reason is Reason.INCOMPATIBLE_ENTRY
    assert found.detail == report.spans[0].miss_detail
    assert found.detail.startswith("slot ")
    assert found.detail in str(report.reason)


def test_closed_store(pair: Pair) -> None:
    ask(pair, ONE)
    pair.engine.close()
    pair.run(**tiny_vlm_inputs(5, 6, [ONE]))
    (found,) = pair.engine.explain_miss()
    assert found.reason is Reason.STORE_CLOSED
    with pytest.raises(StoreError):
        pair.engine.explain_miss(key=str(key_of("y")))


def test_another_engine_explains_from_the_listing() -> None:
    """A new process has seen nothing, but its store has the entries of others."""
    store = MemoryStore(1 << 24)
    model = tiny_vlm(last_only=False)
    ask(with_backend(model, store=store), ONE)
    changed = tiny_vlm(last_only=False)
    with torch.no_grad():
        changed.decoder.layers[0].mlp.up.weight.mul_(2.0)
    report, (found,) = ask(with_backend(changed, store=store, budget=0.3), ONE)
    assert report.reason_code is Reason.NEW_ITEM  # calls do not read listings
    assert (found.reason, found.differs) == (Reason.OTHER_WEIGHTS, ("decoder weights",))


def test_grid_of_equal_pixels() -> None:
    pair = with_api(tiny_qwen2_5_vl(2), min_span_tokens=4)
    pair.run(**qwen_inputs(4, 5, [(4, 12, 1)]))
    pair.run(**qwen_inputs(4, 5, [(12, 4, 1)]))
    assert pair.report["spans"][0]["miss_reason"] is Reason.OTHER_ENCODING
    (found,) = pair.engine.explain_miss()
    assert found.differs[0] == "grid"
    parts = [entry.info.get("parts", {}) for entry in pair.engine.store.entries()]
    kinds = [entry.key.partition("-")[0] for entry in pair.engine.store.entries()]
    of_donors = [own for own, kind in zip(parts, kinds, strict=True) if kind == "donor"]
    of_features = [own for own, kind in zip(parts, kinds, strict=True) if kind == "features"]
    assert all({"content", "weights", "positions"} <= own.keys() for own in of_donors)
    assert all({"content", "state", "settings"} <= own.keys() for own in of_features)
    assert len(of_donors) == len(of_features) == 2
    assert {own["salt"] for own in [*of_donors, *of_features]} == {salt_tag("")}
