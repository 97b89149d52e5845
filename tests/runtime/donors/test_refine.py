"""Refined donors: the error of means, and no exact reuse of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.runtime.donors.refine import admit_item, contexts_of, exact_key
from vlcache_fx.store import Entry, MemoryStore
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

from ...models import batch_of, padded
from ..helpers import Pair, hits, keys, settings_of, with_backend

LENGTH = 5
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def rows_of(context: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the rows of an item in a context."""
    made = torch.Generator().manual_seed(context)
    return {
        "0.k": torch.randn(1, 2, LENGTH, 4, generator=made).to(dtype),
        "residual": torch.randn(1, LENGTH, 8, generator=made).mul(100).to(dtype),
    }


def donor_of(
    contexts: list[int], most: int, dtype: torch.dtype = torch.float32, capacity_bytes: int = 1 << 20
) -> tuple[Entry, MemoryStore]:
    store = MemoryStore(capacity_bytes)
    for context in contexts:
        assert admit_item(store, "item", rows_of(context, dtype), LENGTH, str(context), most)
    donor = store.get("item")
    assert donor is not None
    return donor, store


def mean_of(contexts: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    found = [rows_of(context, dtype) for context in contexts]
    return {name: torch.stack([rows[name].double() for rows in found]).mean(0) for name in found[0]}


@settings(deadline=None)
@given(
    contexts=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    most=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
)
def test_refined_is_mean_of_first_contexts(contexts: list[int], most: int, dtype: torch.dtype) -> None:
    donor, store = donor_of(contexts, most, dtype)
    counted = list(dict.fromkeys(contexts))[:most] if most > 1 else contexts[-1:]
    assert contexts_of(donor) == tuple(map(str, counted))
    # One rounding per context beyond the first: see ``refined``.
    units = (len(counted) + 1) / 4 - 1 / (2 * len(counted)) + 0.01
    for name, want in mean_of(counted, dtype).items():
        got = donor.tensors[name]
        largest = max(float(rows_of(context, dtype)[name].abs().max()) for context in counted)
        unit = 2 * largest * torch.finfo(dtype).eps if len(counted) > 1 else 0.0
        assert got.dtype == dtype
        assert float((got.double() - want).abs().max()) <= units * unit
    # Exact only if it is of a single context.
    assert ("before" in donor.info) == (len(counted) == 1)
    copy = store.get(exact_key("item"))
    assert (copy is None) == (most == 1 or len(set(contexts)) == 1)
    if copy is not None:
        assert copy.info["before"] == str(contexts[-1]) or contexts[-1] == contexts[0]
        assert all(
            torch.equal(copy.tensors[n], t) for n, t in rows_of(int(str(copy.info["before"])), dtype).items()
        )


@given(order=st.permutations(range(4)))
def test_refined_ignores_context_order(order: list[int]) -> None:
    donor, _ = donor_of(order, 4)
    for name, want in mean_of(list(range(4)), torch.float32).items():
        torch.testing.assert_close(donor.tensors[name], want.float(), atol=1e-4, rtol=1e-5)


def test_refined_does_not_write_to_donor() -> None:
    store = MemoryStore(1 << 20)
    admit_item(store, "item", rows_of(0), LENGTH, "0", 4)
    served = store.get("item")
    assert served is not None
    given = rows_of(1)
    admit_item(store, "item", given, LENGTH, "1", 4)
    assert store.get("item") is not served
    for name, tensor in rows_of(0).items():
        assert torch.equal(served.tensors[name], tensor)
        assert torch.equal(given[name], rows_of(1)[name])


def test_admit_item_with_donor_of_other_graph() -> None:
    store = MemoryStore(1 << 20)
    few = {name: rows for name, rows in rows_of(1).items() if name != "residual"}
    for rows, before, slots in ((few, "1", 1), (rows_of(2), "2", 2), (few, "1", 2)):
        admit_item(store, "item", rows, LENGTH, before, 4)
        donor = store.get("item")
        assert donor is not None
        assert (len(donor.tensors), contexts_of(donor)) == (slots, ("1",) if slots == 1 else ("2",))


def test_maps_of_other_cuts_are_no_context() -> None:
    """Maps of recurrent layers between other rows: the latest donor replaces the earlier one."""
    store = MemoryStore(1 << 20)
    for context, cuts, want in (
        (0, [0, 2, LENGTH], ("0",)),
        (1, [0, 2, LENGTH], ("0", "1")),
        (2, [0, 3, LENGTH], ("2",)),
        (3, [0, 3, LENGTH], ("2", "3")),
        (4, [], ("4",)),
    ):
        maps = {"0.factor.0": torch.full((2, 1, 3, 3), float(context))} if cuts else {}
        rows = {**rows_of(context), **maps} if cuts else rows_of(context) | {"0.factor.0": torch.zeros(2)}
        admit_item(store, "item", rows, LENGTH, str(context), 4, cuts=cuts)
        donor = store.get("item")
        assert donor is not None
        assert contexts_of(donor) == want
        assert donor.info.get("cuts", []) == cuts


def test_refined_maps_are_means() -> None:
    store = MemoryStore(1 << 20)
    maps = [torch.full((2, 1, 3, 3), value) for value in (1.0, 4.0)]
    for context, own in enumerate(maps):
        rows = rows_of(context) | {"0.factor.0": own}
        admit_item(store, "item", rows, LENGTH, str(context), 4, cuts=[0, 2, LENGTH])
    donor, exact = store.get("item"), store.get(exact_key("item"))
    assert donor is not None
    assert exact is not None
    assert torch.equal(donor.tensors["0.factor.0"], torch.full((2, 1, 3, 3), 2.5))
    assert donor.info["cuts"] == exact.info["cuts"] == [0, 2, LENGTH]
    assert torch.equal(exact.tensors["0.factor.0"], maps[1])


def test_exact_copy_is_evicted_first() -> None:
    one = sum(tensor.nbytes for tensor in rows_of(0).values())
    for room, held in ((1, False), (2, True)):
        donor, store = donor_of([0, 1], 4, capacity_bytes=room * one)
        assert len(contexts_of(donor)) == 2
        assert (exact_key("item") in store) is held


# In requests ------------------------------------------------------------------------------------------------

IMAGE = 24
BEFORE, AFTER = 20, 30


@pytest.fixture(scope="module")
def compiled(_compiler: None) -> Pair:
    """The policy recomputes no rows, so approximate reuse shows."""
    return with_backend(
        tiny_vlm(num_layers=2, last_only=False), policy="none", shadow=1.0, shadow_max_violations=10**6
    )


@pytest.fixture
def vlm(compiled: Pair) -> Pair:
    compiled.engine.clear()
    return compiled


def prompt(images: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    """Return prompts of one length, for bitwise equal rows, without a common prefix."""
    return tiny_vlm_inputs(BEFORE, AFTER, [(IMAGE, image) for image in images], text_seed=seed)


def contexts(report: dict) -> list[int]:
    return [span["donor_contexts"] for span in report["spans"]]


def test_recomputed_item_refines(vlm: Pair) -> None:
    exact = []
    for seed in (1, 4):
        vlm.engine.clear()
        vlm.run(**prompt((0, 1), seed))
        exact.append(vlm.engine.store.get(keys(vlm.report)[0]))
    with vlm.engine.guards.off():  # no shadow runs
        vlm.engine.clear()
        vlm.run(**prompt((0, 0), 1))  # twice in one prompt: two contexts
        assert (vlm.report["mode"], contexts(vlm.report)) == ("cold", [0, 0])
        vlm.engine.clear()
        assert vlm.run(**prompt((0, 2), 1))[1]["mode"] == "cold"
        assert contexts(vlm.run(**prompt((0, 1), 2))[1]) == [1, 0]
        assert vlm.run(**prompt((0, 1), 4))[1]["mode"] == "cold"  # its second image has missed again
        off, report = vlm.run(**prompt((0, 1), 5))
    assert (report["mode"], contexts(report)) == ("warm", [2, 1])
    assert off > 1e-5
    donor = vlm.engine.store.get(keys(report)[0])
    assert donor is not None
    assert "residual" in donor.tensors
    for name, tensor in donor.tensors.items():
        first, second = (entry.tensors[name] for entry in exact if entry is not None)
        assert not torch.equal(first, second) or name in ("0.k", "0.v")
        torch.testing.assert_close(tensor, (first + second) / 2, atol=1e-5, rtol=1e-5)


def test_latest_context_is_exact(vlm: Pair) -> None:
    with vlm.engine.guards.off():
        for images, seed in (((0, 2), 1), ((0, 1), 2), ((0, 1), 4)):
            vlm.run(**prompt(images, seed))
        off, report = vlm.run(**prompt((0, 1), 4))
        assert (report["prefix_tokens"], contexts(report)) == (report["num_tokens"], [1, 1])
        assert off <= 1e-5
        _, report = vlm.run(**prompt((0, 2), 1))  # only the mean includes the first context
        assert (report["prefix_tokens"], contexts(report)) == (0, [2, 1])


@settings(max_examples=12, deadline=None)
@given(
    calls=st.lists(
        st.tuples(st.sampled_from([(0, 1), (0, 2), (0, 0)]), st.integers(1, 2)),
        min_size=4,
        max_size=8,
    ),
    most=st.sampled_from([1, 2, 4]),
)
def test_exact_prefix_is_bitwise_equal(
    compiled: Pair, calls: list[tuple[tuple[int, int], int]], most: int
) -> None:
    compiled.engine.clear()
    with settings_of(compiled.engine, donor_contexts=most):
        for images, seed in calls:
            got, want = compiled.both(**prompt(images, seed))
            report = compiled.report
            known = min(report["prefix_tokens"], report["num_tokens"] - 2)  # two rows are always computed
            assert torch.equal(got[:, :known], want[:, :known])
            assert all(n == 1 for n, s in zip(contexts(report), report["spans"], strict=True)
                       if s["start"] < known)  # fmt: skip
            assert max(contexts(report)) <= most
            if report["shadow_kl"] is not None or report["mode"] == "cold":
                assert torch.equal(got, want)


def test_batches_are_contexts() -> None:
    pair = with_backend(padded(num_layers=2), policy="none", shadow=1.0)
    for seed in range(1, 4):
        call = batch_of(
            tiny_vlm_inputs(5, 6, [(IMAGE, 0)], text_seed=seed),
            tiny_vlm_inputs(9, 3, [(IMAGE + 2, 1)], text_seed=seed),
        )
        pair.run(**call)
        assert hits(pair.report) == [seed > 1] * 2
        assert contexts(pair.report) == [seed - 1] * 2
    pair.run(**call)  # a repeated context counts once
    assert contexts(pair.report) == [3, 3]
    pair.run(**call)
    assert contexts(pair.report) == [3, 3]
