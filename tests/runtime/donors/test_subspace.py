"""Differences of low rank: what they keep of contexts, and what they take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.runtime.donors.refine import admit_item, contexts_of
from vlcache_fx.runtime.donors.subspace import (
    LARGEST_SHARE,
    Differences,
    Subspace,
    differences_fit,
    explained,
    extended,
    part_names,
    rank_for,
    subspace_of,
)
from vlcache_fx.spec.decoder import RowSpec
from vlcache_fx.spec.slots import Key, Residual, StoredSlot, Value
from vlcache_fx.store import Entry, MemoryStore

LENGTH, HEADS, WIDTH = 96, 2, 32
SPECS: dict[StoredSlot, RowSpec] = {
    Key(0): RowSpec(2, "float32", (1, HEADS, None, WIDTH)),
    Value(0): RowSpec(2, "float32", (1, HEADS, None, WIDTH)),
    Residual(): RowSpec(1, "float32", (1, None, 16)),
}


def random(*sizes: int, seed: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def context(number: int, rank: int = 2) -> dict[str, Tensor]:
    """Rows that differ from those of other contexts by a matrix of this rank."""
    left, right = random(LENGTH, rank, seed=1), random(rank, HEADS * WIDTH, seed=2)
    found = {"residual": random(1, LENGTH, 16, seed=number)}
    for index, name in enumerate(("0.k", "0.v")):
        change = left @ random(rank, rank, seed=10 + 2 * number + index) @ right
        rows = random(LENGTH, HEADS * WIDTH, seed=index) + change
        found[name] = rows.view(1, LENGTH, HEADS, WIDTH).transpose(1, 2).contiguous()
    return found


def admitted(contexts: list[dict[str, Tensor]], rank: int = 8, most: int = 8, **options: object) -> Entry:
    store = MemoryStore(1 << 24)
    differences = Differences.of(rank, most, SPECS)
    for number, rows in enumerate(contexts):
        assert admit_item(store, "item", rows, LENGTH, str(number), most, differences=differences)
    found = store.get("item")
    assert found is not None
    return found


def rebuilt(entry: Entry, slot: StoredSlot, index: int) -> Tensor:
    """The rows of a context, from the mean and its difference."""
    known = subspace_of(entry, slot)
    assert known is not None
    difference = (known.left @ known.core[index] @ known.right).view(LENGTH, HEADS, WIDTH)
    return entry.tensors[str(slot)] + difference.transpose(0, 1)


def test_contexts_of_low_rank_are_kept() -> None:
    contexts = [context(number) for number in range(4)]
    entry = admitted(contexts)
    assert len(contexts_of(entry)) == 4
    for slot in (Key(0), Value(0)):
        for number, rows in enumerate(contexts):
            torch.testing.assert_close(rebuilt(entry, slot, number), rows[str(slot)], atol=1e-4, rtol=1e-4)
    assert subspace_of(entry, Residual()) is None  # only keys and values are fitted
    assert differences_fit(entry, SPECS)


def test_mean_is_that_of_donors_without_differences() -> None:
    contexts = [context(number) for number in range(3)]
    with_them, without = admitted(contexts), admitted(contexts, rank=0)
    for name, tensor in without.tensors.items():
        assert torch.equal(with_them.tensors[name], tensor)
    assert not differences_fit(without, SPECS)


def test_a_context_that_adds_nothing_is_not_kept() -> None:
    """The fourth is a combination of the others."""
    contexts = [context(number) for number in range(3)]
    mixed = {
        name: 0.5 * contexts[0][name] + 0.8 * contexts[1][name] - 0.3 * contexts[2][name]
        for name in contexts[0]
    }
    kept, same = admitted(contexts), admitted([*contexts, mixed])
    assert len(contexts_of(same)) == 3
    for name, tensor in kept.tensors.items():
        assert torch.equal(same.tensors[name], tensor)
    assert len(contexts_of(admitted([*contexts, context(3)]))) == 4


def test_bound_on_contexts() -> None:
    entry = admitted([context(number) for number in range(6)], most=4)
    assert len(contexts_of(entry)) == 4
    known = subspace_of(entry, Key(0))
    assert known is not None
    assert len(known.core) == 4


@given(st.integers(1, 3000), st.integers(1, 2000), st.integers(2, 16), st.integers(2, 64))
def test_rank_is_bounded_by_bytes(length: int, width: int, contexts: int, rank: int) -> None:
    found = rank_for(length, width, contexts, rank)
    assert found == 0 or 2 <= found <= min(rank, length, width)
    assert found * (length + width) + contexts * found**2 <= LARGEST_SHARE * length * width
    larger = found + 1 if found else 2
    if larger <= min(rank, length, width):
        assert larger * (length + width) + contexts * larger**2 > LARGEST_SHARE * length * width


@given(st.integers(2, 6), st.integers(0, 20))
def test_differences_are_the_best_of_their_rank(rank: int, seed: int) -> None:
    """Within a tenth of the error of the best left and right spaces (a Tucker decomposition by SVD)."""
    contexts = [random(40, 24, seed=seed * 10 + number) * (0.5**number) for number in range(4)]
    mean, known = contexts[0], None
    for number, rows in enumerate(contexts[1:], 1):
        shift = (rows - mean) / (number + 1)
        known = extended(known, shift, number, rank)
        mean = mean + shift
    assert known is not None
    differences = torch.stack(contexts) - mean
    kept = known.left @ known.core @ known.right
    left = torch.linalg.svd(differences.transpose(0, 1).flatten(1))[0][:, :rank]
    right = torch.linalg.svd(differences.flatten(0, 1))[2][:rank]
    best = left @ (left.t() @ differences @ right.t()) @ right
    assert (kept - differences).square().sum() < 1.3 * (best - differences).square().sum()
    torch.testing.assert_close(known.right @ known.right.t(), torch.eye(rank), atol=1e-5, rtol=0)


def test_same_rows_give_the_same_differences_and_leave_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = (admitted([context(number) for number in range(3)]) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in first.tensors.items():
        assert torch.equal(second.tensors[name], tensor)


def test_explained_energy() -> None:
    known = Subspace(torch.eye(5)[:, :2], torch.tensor([[[3.0, 0], [0, 0]]]), torch.eye(4)[:2])
    difference = torch.zeros(5, 4)
    difference[0, 0], difference[1, 1] = 2.0, 1.0
    assert 3.9 < float(explained(known, difference)) <= 4.0  # a ridge shrinks the weight a little
    assert float(explained(known, torch.zeros(5, 4))) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_that_of_the_rows(dtype: torch.dtype) -> None:
    specs = {slot: RowSpec(spec.dim, str(dtype)[6:], spec.sizes) for slot, spec in SPECS.items()}
    store, differences = MemoryStore(1 << 24), Differences.of(8, 4, specs)
    for number in range(3):
        rows = {name: tensor.to(dtype) for name, tensor in context(number).items()}
        assert admit_item(store, "item", rows, LENGTH, str(number), 4, differences=differences)
    entry = store.get("item")
    assert entry is not None
    assert {tensor.dtype for tensor in entry.tensors.values()} == {dtype}
    assert differences_fit(entry, specs)
    got = rebuilt(entry, Key(0), 1)
    torch.testing.assert_close(got, context(1)["0.k"].to(dtype), atol=0.2, rtol=0.05)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_differences_that_do_not_fit(part: int) -> None:
    entry = admitted([context(number) for number in range(3)])
    name = part_names(Value(0))[part]
    for bad in (entry.tensors[name][..., 1:], entry.tensors[name].double(), None):
        tensors = {**entry.tensors, name: bad} if bad is not None else {**entry.tensors}
        if bad is None:
            del tensors[name]
        assert not differences_fit(Entry(tensors, entry.info), SPECS)


def test_a_donor_without_differences_gets_them() -> None:
    """It was refined where the option was off: what its contexts differed by is not known."""
    store = MemoryStore(1 << 24)
    for number in range(2):
        admit_item(store, "item", context(number), LENGTH, str(number), 8)
    for number in range(2, 5):
        given_rows = context(number)
        admit_item(store, "item", given_rows, LENGTH, str(number), 8, differences=Differences.of(8, 8, SPECS))
    entry = store.get("item")
    assert entry is not None
    assert differences_fit(entry, SPECS)
    torch.testing.assert_close(rebuilt(entry, Key(0), -1), context(4)["0.k"], atol=1e-4, rtol=1e-4)
