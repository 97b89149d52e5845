"""The operators: schema, fake and reference agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from vlcache_fx.errors import StoreError
from vlcache_fx.ops import bind_donors, splice_rows_reference

vlcache = torch.ops.vlcache


@given(
    donor_rows=st.integers(1, 5), rows=st.integers(1, 5), dim=st.integers(-3, 2), data=st.data(),
)  # fmt: skip
@settings(max_examples=25)
def test_splice_takes_each_token_from_where_its_source_says(
    donor_rows: int, rows: int, dim: int, data: st.DataObject
) -> None:
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
def test_splice_passes_torchs_own_checks(dim: int) -> None:
    donor, fresh = torch.randn(1, 3, 4), torch.randn(1, 2, 4)
    source = torch.tensor([0, -1, 2, -2, 1])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(vlcache.splice_rows.default, (donor, fresh, source, dim), test_utils=checks)


def test_splice_has_the_dtype_of_what_is_computed() -> None:
    half = torch.ones(1, 2, 4, dtype=torch.bfloat16)
    with FakeTensorMode() as mode:
        fake = vlcache.splice_rows(
            mode.from_tensor(half), mode.from_tensor(half), torch.zeros(5, dtype=torch.int64), 1
        )
    assert (fake.dtype, tuple(fake.shape)) == (torch.bfloat16, (1, 5, 4))
    assert vlcache.splice_rows(half, half, torch.zeros(5, dtype=torch.int64), 1).dtype is torch.bfloat16


def test_lookup_reads_what_is_bound() -> None:
    like, table = torch.zeros(1, 9, 4), torch.randn(1, 3, 4)
    with bind_donors({"0.k": table}):
        got = vlcache.lookup(like, "0.k", 1)
        assert torch.equal(got, table)
        got.zero_()  # what is stored cannot be written to
        assert torch.equal(vlcache.lookup(like, "0.k", 1), table)
        with pytest.raises(StoreError, match=r"slot '0.v'; bound: \['0.k'\]"):
            vlcache.lookup(like, "0.v", 1)


def test_bindings_nest_and_end() -> None:
    like = torch.zeros(1, 1)
    with bind_donors({"a": torch.ones(1, 1)}):
        with bind_donors({"a": torch.full((1, 1), 2.0)}):
            assert vlcache.lookup(like, "a", 0).item() == 2
        assert vlcache.lookup(like, "a", 0).item() == 1
    with pytest.raises(StoreError, match="no donor table is bound"):
        vlcache.lookup(like, "a", 0)


def test_a_fake_lookup_has_a_size_of_its_own() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        like = mode.from_tensor(torch.zeros(1, 9, 4))
        fake = vlcache.lookup(like, "0.k", 1)
    assert isinstance(fake.shape[1], torch.SymInt)
    assert (fake.shape[0], fake.shape[2]) == (1, 4)
