"""Donors of a request: never of another image, approximate or damaged."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from vlcache_fx.bench.stress.wrapper import StoreWrapper
from vlcache_fx.errors import StoreError
from vlcache_fx.store import Entry, MemoryStore
from vlcache_fx.testing.families import qwen_inputs, tiny_qwen2_5_vl
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ..helpers import Pair, hits, keys, settings_of, vlcache_store, with_api, with_backend

A, B, C = (24, 0), (30, 1), (27, 2)
LAYERS = 2


@pytest.fixture(scope="module")
def compiled(_compiler: None) -> Pair:
    return with_backend(tiny_vlm(num_layers=LAYERS, last_only=False), policy="full")


@pytest.fixture
def vlm(compiled: Pair) -> Pair:
    compiled.engine.clear()
    return compiled


def prompt(*images: tuple[int, int], before: int = 5, seed: int = 0) -> dict[str, Tensor]:
    return tiny_vlm_inputs(before, 6, images, text_seed=seed)


# Two images -------------------------------------------------------------------------------------------------


def test_new_second_image_has_no_donor(vlm: Pair) -> None:
    off, first = vlm.run(**prompt(A, B))
    assert first["mode"] == "cold"
    off, second = vlm.run(**prompt(A, C))
    assert hits(second) == [True, False]
    assert keys(first)[0] == keys(second)[0]
    assert keys(second)[1] not in keys(first)
    assert off == 0.0
    off, third = vlm.run(**prompt(C, A, seed=3))
    assert set(keys(third)) == set(keys(second))  # the same items in another order


def test_images_of_equal_length_differ_by_content(vlm: Pair) -> None:
    _, first = vlm.run(**prompt((24, 0), (24, 1)))
    off, second = vlm.run(**prompt((24, 0), (24, 2)))
    assert hits(second) == [True, False]
    assert not set(keys(first)) & {keys(second)[1]}
    assert off == 0.0


def test_changed_value_is_another_image(vlm: Pair) -> None:
    inputs = prompt(A)
    _, first = vlm.run(**inputs)
    inputs["pixel_values"][-1, -1] += 1e-3
    off, second = vlm.run(**inputs)
    assert second["mode"] == "cold"
    assert keys(first) != keys(second)
    assert off == 0.0


def test_approximate_rows_are_not_stored(vlm: Pair) -> None:
    store = vlm.engine.store
    vlm.run(**prompt(A))
    with vlm.engine.using(policy="none"):
        _, report = vlm.run(**prompt(A, C, seed=1))
        assert hits(report) == [True, False]
        assert report["mode"] == "warm"
        key_a, key_c = keys(report)
        assert key_a in store
        assert key_c not in store  # its rows attended to donor rows of A
        donor = store.get(key_a)
        # It recurs: a cold run stores its rows.
        off, report = vlm.run(**prompt(A, C, seed=2))
        assert report["mode"] == "cold"
        assert hits(report) == [False, False]
        assert off == 0.0
        assert key_c in store
        _, report = vlm.run(**prompt(A, C, seed=3))
        assert hits(report) == [True, True]
    assert donor is not None


def test_stored_rows_equal_cold_run(vlm: Pair) -> None:
    """After any history, a donor equals the rows of a cold run in some context (no means here)."""
    store = vlm.engine.store
    with settings_of(vlm.engine, donor_contexts=1):
        with vlm.engine.using(policy="none"):
            for seed, images in enumerate([(A,), (A, C), (C, A), (A, C, B), (B, C)]):
                vlm.run(**prompt(*images, seed=seed))
        _, report = vlm.run(**prompt(A, C, B, seed=9))
    before = {key: store.get(key) for key in keys(report)}
    exact: dict[str, list[Entry]] = {key: [] for key in before}
    # Every prompt again, alone and cold.
    for seed, images in enumerate([(A,), (A, C), (C, A), (A, C, B), (B, C)]):
        vlm.engine.clear()
        _, report = vlm.run(**prompt(*images, seed=seed))
        assert report["mode"] == "cold"
        for key in keys(report):
            entry = store.get(key)
            assert entry is not None
            exact[key].append(entry)
    held = {key: entry for key, entry in before.items() if entry is not None}
    assert len(held) >= 2
    for key, entry in held.items():
        assert any(
            all(torch.equal(entry.tensors[name], other.tensors[name]) for name in entry.tensors)
            for other in exact[key]
        )


def test_same_image_twice_in_prompt(vlm: Pair) -> None:
    off, report = vlm.run(**prompt(A, A))
    assert report["mode"] == "cold"
    assert off == 0.0
    assert keys(report)[0] == keys(report)[1]
    assert [span["start"] for span in report["spans"]] == [5, 31]
    off, report = vlm.run(**prompt(A, A, before=9, seed=1))
    assert hits(report) == [True, True]
    assert off == 0.0
    off, report = vlm.run(**prompt(A, B, A, seed=2))
    assert hits(report) == [True, False, True]
    assert off == 0.0
    with vlm.engine.using(policy="layer_aware", budget=0.1):
        off, report = vlm.run(**prompt(A, A, before=2, seed=3))
        assert hits(report) == [True, True]
        assert report["rows_per_layer"][0] == report["num_tokens"] - 2 * 24 + 2 * 2


def test_images_without_text_between_are_one_item(vlm: Pair) -> None:
    """They are indistinguishable: the pair is one item, without the first image's donor."""
    vlm.run(**prompt(A))
    off, report = vlm.run(**tiny_vlm_inputs(5, 6, [A, B], between=0))
    assert [span["length"] for span in report["spans"]] == [54]
    assert hits(report) == [False]
    assert off == 0.0


# Grids ------------------------------------------------------------------------------------------------------


def test_keys_cover_grid() -> None:
    """30x150 and 150x30: equal token counts and bytes, but other neighbours under M-RoPE."""
    pair = with_api(tiny_qwen2_5_vl(1), policy="full")
    seen: dict[tuple[int, int], list[str]] = {}
    for grid in [(6, 20), (20, 6), (6, 20), (20, 6)]:
        inputs = qwen_inputs(4, 3, [(*grid, 0)])
        inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], 0.25)  # constant features
        with torch.no_grad():
            got = pair.model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
            expected = pair.reference.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        assert torch.equal(got, expected)
        assert hits(pair.report) == [grid in seen]
        seen.setdefault(grid, []).extend(keys(pair.report))
    tall, wide = (set(found) for found in seen.values())
    assert len(tall) == len(wide) == 1
    assert not tall & wide


# Stores -----------------------------------------------------------------------------------------------------


def test_small_store_evicts() -> None:
    one_donor = 24 * (16 + LAYERS * 2 * 8) * 4  # residual, and keys and values of each layer
    store = vlcache_store(capacity_bytes=3 * one_donor)
    pair = with_backend(tiny_vlm(num_layers=LAYERS, last_only=False), store=store, policy="full")
    for place in range(12):
        off, _ = pair.run(**prompt((24, place % 4), before=3 + place, seed=place))
        assert off == 0.0
        assert store.stats().used_bytes <= store.stats().capacity_bytes
    assert store.stats().evictions > 0
    assert pair.engine.stats()["store"]["used_bytes"] <= 3 * one_donor


def test_donor_too_large_for_store() -> None:
    pair = with_backend(tiny_vlm(num_layers=LAYERS, last_only=False), store=vlcache_store(64), policy="none")
    for place in range(3):
        off, report = pair.run(**prompt(A, seed=place))
        assert report["mode"] == "cold"
        assert off == 0.0
    assert pair.engine.stats()["store"]["rejections"] > 0
    assert len(pair.engine.store) == 0


def test_second_donor_too_large_for_store() -> None:
    big = (100, 5)
    donor_bytes = (16 + LAYERS * 2 * 8) * 4  # per token; encoder outputs, 16 * 4 per token, need room as well
    store = vlcache_store(90 * donor_bytes)
    pair = with_backend(tiny_vlm(num_layers=LAYERS, last_only=False), store=store, policy="full")
    pair.run(**prompt(A))
    modes = [pair.run(**prompt(A, big, seed=seed))[1]["mode"] for seed in range(4)]
    # The second miss makes the call cold; the store refuses the donor, so later misses do not.
    assert modes == ["warm", "cold", "warm", "warm"]


class Wrapped(StoreWrapper):
    """A store that fails on request."""

    def __init__(self) -> None:
        super().__init__(MemoryStore(1 << 30))
        self.fail_get = self.fail_put = False
        self.spoil: Any = None

    def get(self, key: str) -> Entry | None:
        if self.fail_get:
            raise StoreError("cannot be read")
        entry = self.inner.get(key)
        return self.spoil(entry) if self.spoil is not None and entry is not None else entry

    def put(self, key: str, entry: Entry) -> bool:
        if self.fail_put:
            raise StoreError("cannot be written")
        return self.inner.put(key, entry)


@pytest.fixture(scope="module")
def wrapped(_compiler: None) -> Pair:
    return with_backend(tiny_vlm(num_layers=LAYERS, last_only=False), store=Wrapped(), policy="none")


@pytest.fixture
def unreliable(wrapped: Pair) -> Pair:
    store: Any = wrapped.engine.store
    store.fail_get = store.fail_put = False
    store.spoil = None
    wrapped.engine.clear()
    return wrapped


@pytest.mark.parametrize("failing", ["get", "put", "both"])
def test_failing_store_costs_reuse_only(
    unreliable: Pair, failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    store: Any = unreliable.engine.store
    store.fail_get, store.fail_put = failing != "put", failing != "get"
    before = unreliable.engine.stats()["store_failures"]
    with caplog.at_level(logging.WARNING, logger="vlcache_fx"):
        for place in range(2):
            off, report = unreliable.run(**prompt(A, B, seed=place))
            assert report["mode"] == "cold"
            assert off == 0.0
    # Each of the two calls reads two donors, the first block of text and the encoder's output, and writes two
    # donors, three texts and the output. The second one reads the first one's donors again, to refine them.
    expected = {"get": 2 * 4 + 2, "put": 2 * 6, "both": 2 * (4 + 6)}[failing]
    assert unreliable.engine.stats()["store_failures"] - before == expected
    assert "the store failed, computing without reuse: cannot be" in caplog.text
    store.fail_get = store.fail_put = False
    if failing == "get":  # all writes succeeded
        assert unreliable.run(**prompt(A, B, seed=2))[1]["mode"] == "warm"


def test_strict_raises_store_errors() -> None:
    store = Wrapped()
    pair = with_backend(tiny_vlm(num_layers=LAYERS), store=store, strict=True)
    store.fail_get = True
    with pytest.raises(StoreError, match="cannot be read"), torch.no_grad():
        pair.model(**prompt(A))


def _changed(entry: Entry, change: Any) -> Entry:
    return Entry({name: change(name, tensor) for name, tensor in entry.tensors.items()}, entry.info)


SPOILED = {
    "no tensors": lambda entry: Entry({}, entry.info),
    "a slot is missing": lambda entry: Entry(
        {name: tensor for name, tensor in entry.tensors.items() if name != "1.k"}, entry.info
    ),
    "too few rows": lambda entry: _changed(
        entry, lambda _, tensor: tensor[:, :-1] if tensor.dim() > 2 else tensor[:-1]
    ),
    "other heads": lambda entry: _changed(entry, lambda _, tensor: torch.cat([tensor, tensor], -1)),
    "another dtype": lambda entry: _changed(entry, lambda _, tensor: tensor.half()),
    "another rank": lambda entry: _changed(entry, lambda _, tensor: tensor.flatten()),
}


@pytest.mark.parametrize("how", SPOILED)
def test_incompatible_entry_is_a_miss(unreliable: Pair, how: str) -> None:
    store: Any = unreliable.engine.store
    unreliable.run(**prompt(A))
    store.spoil = SPOILED[how]
    off, report = unreliable.run(**prompt(A, before=9, seed=1))
    assert report["mode"] == "cold"
    assert hits(report) == [False]
    # An encoder's output has no rows per layer, so it stays complete.
    assert report["encoder_hit"] is (how == "a slot is missing")
    assert off == 0.0


def test_clear(vlm: Pair) -> None:
    vlm.run(**prompt(A))
    assert len(vlm.engine.store) == 4  # a donor, the texts around it, and an encoder's output
    assert vlm.run(**prompt(A))[1]["mode"] == "warm"
    vlm.engine.clear()
    assert len(vlm.engine.store) == 0
    off, report = vlm.run(**prompt(A))
    assert report["mode"] == "cold"
    assert report["encoder_hit"] is False
    assert off == 0.0


def test_model_works_after_close() -> None:
    pair = with_backend(tiny_vlm(num_layers=LAYERS, last_only=False), policy="none")
    pair.run(**prompt(A))
    pair.engine.close()
    pair.engine.close()
    for place in range(2):
        off, report = pair.run(**prompt(A, seed=place))
        assert report["mode"] == "cold"
        assert off == 0.0
    assert pair.engine.stats()["store"]["used_bytes"] == 0
