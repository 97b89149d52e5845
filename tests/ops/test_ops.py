"""Schema, fake and reference of each operator agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from vlcache_fx.errors import StoreError
from vlcache_fx.ops import (
    bind_donors,
    scatter_rows_reference,
    splice_rows_reference,
    take_rows_reference,
)

vlcache = torch.ops.vlcache


@given(
    donor_rows=st.integers(1, 5), rows=st.integers(1, 5), dim=st.integers(-3, 2), data=st.data(),
)  # fmt: skip
@settings(max_examples=25)
def test_splice_rows_equals_definition(donor_rows: int, rows: int, dim: int, data: st.DataObject) -> None:
    source = data.draw(st.lists(st.integers(-rows, donor_rows - 1), min_size=1, max_size=8))

    def table(count: int, start: float) -> torch.Tensor:
        sizes = [2, 3, 2]
        sizes[dim] = count
        return start + torch.arange(float(torch.Size(sizes).numel())).reshape(sizes)

    donor, fresh = table(donor_rows, 0.0), table(rows, 100.0)
    got = vlcache.splice_rows(donor, fresh, torch.tensor(source), dim)
    want = torch.stack([donor.select(dim, v) if v >= 0 else fresh.select(dim, -v - 1) for v in source], dim)
    assert torch.equal(got, want)
    assert torch.equal(splice_rows_reference(donor, fresh, torch.tensor(source), dim), want)


@pytest.mark.parametrize("dim", [1, -2])
def test_splice_rows_opcheck(dim: int) -> None:
    donor, fresh = torch.randn(1, 3, 4), torch.randn(1, 2, 4)
    source = torch.tensor([0, -1, 2, -2, 1])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(vlcache.splice_rows.default, (donor, fresh, source, dim), test_utils=checks)


def test_splice_rows_dtype() -> None:
    half = torch.ones(1, 2, 4, dtype=torch.bfloat16)
    with FakeTensorMode() as mode:
        fake = vlcache.splice_rows(
            mode.from_tensor(half), mode.from_tensor(half), torch.zeros(5, dtype=torch.int64), 1
        )
    assert (fake.dtype, tuple(fake.shape)) == (torch.bfloat16, (1, 5, 4))
    assert vlcache.splice_rows(half, half, torch.zeros(5, dtype=torch.int64), 1).dtype is torch.bfloat16


# Several samples, each with its own rows -------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn, samples: int) -> tuple[int, int, list[int]]:
    """Token dimension, batch dimension (either may be negative), and the other sizes."""
    rank = draw(st.integers(2, 4))
    dim, batch_dim = draw(st.permutations(range(rank)))[:2]
    sizes = [draw(st.integers(1, 3)) for _ in range(rank)]
    sizes[batch_dim] = samples
    back = rank if draw(st.booleans()) else 0
    return dim - back, batch_dim - back, sizes


def numbered(sizes: list[int], start: float = 0.0) -> Tensor:
    """Return a tensor of distinct values."""
    return start + torch.arange(float(torch.Size(sizes).numel())).reshape(sizes)


def with_size(sizes: list[int], dim: int, size: int) -> list[int]:
    changed = list(sizes)
    changed[dim] = size
    return changed


@given(samples=st.integers(1, 3), tokens=st.integers(1, 4), rows=st.integers(1, 5), data=st.data())
def test_take_rows_of_several_samples(samples: int, tokens: int, rows: int, data: st.DataObject) -> None:
    dim, batch_dim, sizes = data.draw(layouts(samples))
    shared = data.draw(st.booleans())  # shared by all samples, like cosine tables
    x = numbered(with_size(with_size(sizes, dim, tokens), batch_dim, 1 if shared else samples))
    places = st.lists(st.integers(0, tokens - 1), min_size=rows, max_size=rows)
    index = torch.tensor(data.draw(st.lists(places, min_size=samples, max_size=samples)))
    # Sample by sample, without the batch dimension.
    parts = [
        x.narrow(batch_dim, 0 if shared else sample, 1).index_select(dim, own)
        for sample, own in enumerate(index)
    ]
    want = torch.cat(parts, batch_dim)
    assert torch.equal(vlcache.take_rows(x, index, dim, batch_dim), want)
    assert torch.equal(take_rows_reference(x, index, dim, batch_dim), want)
    with FakeTensorMode() as mode:
        fake = vlcache.take_rows(mode.from_tensor(x), mode.from_tensor(index), dim, batch_dim)
    assert (fake.shape, fake.dtype) == (want.shape, want.dtype)


@given(
    samples=st.integers(1, 3), donor_rows=st.integers(1, 4), rows=st.integers(1, 4),
    tokens=st.integers(1, 5), data=st.data(),
)  # fmt: skip
def test_splice_rows_of_several_samples(
    samples: int, donor_rows: int, rows: int, tokens: int, data: st.DataObject
) -> None:
    dim, batch_dim, sizes = data.draw(layouts(samples))
    donor = numbered(with_size(with_size(sizes, dim, donor_rows), batch_dim, 1))
    fresh = numbered(with_size(sizes, dim, rows), 1000.0)
    one = st.lists(st.integers(-rows, donor_rows - 1), min_size=tokens, max_size=tokens)
    source = torch.tensor(data.draw(st.lists(one, min_size=samples, max_size=samples)))
    want = torch.cat(
        [
            splice_rows_reference(donor, fresh.narrow(batch_dim, sample, 1), own, dim)
            for sample, own in enumerate(source)
        ],
        batch_dim,
    )
    assert torch.equal(vlcache.splice_rows(donor, fresh, source, dim, batch_dim), want)
    assert torch.equal(splice_rows_reference(donor, fresh, source, dim, batch_dim), want)


@given(samples=st.integers(1, 3), tokens=st.integers(1, 6), deep=st.booleans(), data=st.data())
def test_scatter_rows_equals_definition(samples: int, tokens: int, deep: bool, data: st.DataObject) -> None:
    flags = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    mask = torch.tensor(data.draw(st.lists(flags, min_size=samples, max_size=samples).filter(np.any)))
    features = numbered([int(mask.sum()), 2], 1.0)
    want = torch.zeros(samples, tokens, 2)
    want[mask] = features
    given_as = features[None] if deep else features
    assert torch.equal(vlcache.scatter_rows(given_as, mask), want)
    assert torch.equal(scatter_rows_reference(given_as, mask), want)


ROWS = torch.tensor([[2, 0], [1, 1]])


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        (vlcache.take_rows, (torch.randn(2, 3, 4), ROWS, 1, 0)),
        (vlcache.take_rows, (torch.randn(3, 3, 1, 4), ROWS, 1, 2)),
        (vlcache.splice_rows, (torch.randn(1, 3, 4), torch.randn(2, 2, 4), ROWS - 2, 1, 0)),
        (vlcache.splice_rows, (torch.randn(3, 1, 4), torch.randn(2, 2, 4), ROWS - 2, -3, -2)),
        (vlcache.scatter_rows, (torch.randn(2, 4), ROWS == 1)),
        (vlcache.scatter_rows, (torch.randn(2, 4), (ROWS == 1).t())),
    ],
    ids=lambda value: getattr(value, "_qualified_op_name", ""),
)
def test_row_operators_opcheck(operator: Any, args: tuple[Any, ...]) -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator.default, args, test_utils=checks)


def test_lookup_returns_a_copy_of_the_bound_table() -> None:
    like, table = torch.zeros(1, 9, 4), torch.randn(1, 3, 4)
    with bind_donors({"0.k": table}):
        got = vlcache.lookup(like, "0.k", 1)
        assert torch.equal(got, table)
        got.zero_()  # writes do not reach the bound table
        assert torch.equal(vlcache.lookup(like, "0.k", 1), table)
        with pytest.raises(StoreError, match=r"slot '0.v'; bound: \['0.k'\]"):
            vlcache.lookup(like, "0.v", 1)


def test_bind_donors_nests() -> None:
    like = torch.zeros(1, 1)
    with bind_donors({"a": torch.ones(1, 1)}):
        with bind_donors({"a": torch.full((1, 1), 2.0)}):
            assert vlcache.lookup(like, "a", 0).item() == 2
        assert vlcache.lookup(like, "a", 0).item() == 1
    with pytest.raises(StoreError, match="no donor table is bound"):
        vlcache.lookup(like, "a", 0)


def test_lookup_fake_has_a_new_symbol() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        like = mode.from_tensor(torch.zeros(1, 9, 4))
        fake = vlcache.lookup(like, "0.k", 1)
    assert isinstance(fake.shape[1], torch.SymInt)
    assert (fake.shape[0], fake.shape[2]) == (1, 4)
