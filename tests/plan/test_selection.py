"""Rows that results are made of, as plain data."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlcache_fx.plan.selection import RowSelection

bound = st.none() | st.integers(-12, 12)


@given(st.integers(1, 10), bound, bound, st.integers(1, 4) | st.none())
def test_a_slice_selects_what_brackets_do(
    num_tokens: int, start: int | None, end: int | None, step: int | None
) -> None:
    positions = RowSelection((start, end, step)).positions(num_tokens)
    assert positions.dtype == torch.int64
    assert positions.tolist() == list(range(num_tokens))[start:end:step]


@given(st.integers(1, 10), st.data())
def test_an_index_selects_one_token(num_tokens: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(-num_tokens, num_tokens - 1))
    positions = RowSelection((index,)).positions(num_tokens)
    assert positions.dtype == torch.int64
    assert positions.tolist() == [range(num_tokens)[index]]


def test_a_token_that_is_not_there_is_an_error() -> None:
    with pytest.raises(IndexError):
        RowSelection((5,)).positions(5)


def test_selections_of_equal_bounds_are_equal() -> None:
    assert RowSelection((-1, None, None)) == RowSelection((-1, None, None))
    assert RowSelection((-1, None, None)) != RowSelection((-1,))
