"""Token positions that outputs depend on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlcache_fx.plan.selection import InputPositions, InputSize, RowSelection, SizeSum

bound = st.none() | st.integers(-12, 12)


@given(st.integers(1, 10), bound, bound, st.integers(1, 4) | st.none())
def test_row_selection_slice(num_tokens: int, start: int | None, end: int | None, step: int | None) -> None:
    positions = RowSelection((start, end, step)).positions(num_tokens)
    assert positions.dtype == torch.int64
    assert positions.tolist() == list(range(num_tokens))[start:end:step]


@given(st.integers(1, 10), st.data())
def test_row_selection_index(num_tokens: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(-num_tokens, num_tokens - 1))
    positions = RowSelection((index,)).positions(num_tokens)
    assert positions.dtype == torch.int64
    assert positions.tolist() == [range(num_tokens)[index]]


def test_row_selection_index_out_of_range() -> None:
    with pytest.raises(IndexError):
        RowSelection((5,)).positions(5)


def test_row_selection_equality() -> None:
    assert RowSelection((-1, None, None)) == RowSelection((-1, None, None))
    assert RowSelection((-1, None, None)) != RowSelection((-1,))


def test_row_selection_bounds_from_inputs() -> None:
    last = RowSelection((SizeSum(0, (InputSize(-1, 1),)), None, None))
    assert last.positions(8, (torch.zeros(3, 8), 2)).tolist() == [6, 7]
    between = RowSelection((SizeSum(-4, (InputSize(1, 0, 1),)), SizeSum(1, (InputSize(2, 1),)), None))
    assert between.positions(8, (torch.zeros(3, 8), 3)).tolist() == [4, 5, 6]
    assert RowSelection((SizeSum(-1, (InputSize(-1, 1),)),)).positions(8, (None, 2)).tolist() == [5]


def test_row_selection_positions_from_input() -> None:
    positions = torch.tensor([-1, 3, 3, 0], dtype=torch.int32)
    found = RowSelection((InputPositions(1),)).positions(8, (None, positions))
    assert (found.dtype, found.tolist()) == (torch.int64, [7, 3, 3, 0])
    assert RowSelection((InputPositions(0, from_end=False),)).positions(8, (positions,)).tolist() == [
        -1,
        3,
        3,
        0,
    ]


def test_row_selection_moved() -> None:
    bounds = (SizeSum(1, (InputSize(-1, 4, 1), InputSize(1, 5))), 7, None)
    moved = RowSelection(bounds).moved({4: 0, 5: 2})
    assert moved.bounds == (SizeSum(1, (InputSize(-1, 0, 1), InputSize(1, 2))), 7, None)
    assert RowSelection((InputPositions(5),)).moved({5: 2}) == RowSelection((InputPositions(2),))
