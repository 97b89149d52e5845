"""Which rows the results need."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlcache_fx.analysis import analyze
from vlcache_fx.analysis.outputs import TailRows

from .graphs import attend, capture, captured_vlm

X = torch.randn(1, 6, 4)


def tail_rows(take: Callable[[Tensor], object], dynamic: bool | None = None) -> TailRows:
    def one_layer(x: Tensor) -> object:
        x = x * 2
        return take(x + attend(x))

    return analyze(capture(one_layer, {"x": X}, dynamic=dynamic)).tail_rows


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("take", "positions"),
    [
        (lambda x: x[:, -1:].exp(), [5]),
        (lambda x: x[:, -1].exp(), [5]),
        (lambda x: x.exp()[:, -2:] + 1, [4, 5]),
        (lambda x: (x * 2).relu()[:, 0], [0]),
        (lambda x: x[:, 1:4:2], [1, 3]),
    ],
    ids=["slice", "select", "behind_ops", "first", "step"],
)
def test_selections_with_constant_bounds(
    take: Callable[[Tensor], object], positions: list[int], dynamic: bool | None
) -> None:
    rows = tail_rows(take, dynamic)
    assert rows.selection is not None
    taken = rows.positions(6)
    assert taken is not None
    assert taken.tolist() == positions
    assert rows.selection not in rows.steps


@pytest.mark.parametrize(
    "take",
    [
        lambda x: x.exp(),
        lambda x: x[:, :],
        lambda x: x.flip(1)[:, -1:],
        lambda x: (x.exp(), x[:, -1:]),
        lambda x: (x, x[:, -1:] + 1),
        lambda x: x[:, -1:] + x[:, :1],
        lambda x: x.exp()[..., -1:],
    ],
    ids=["all", "all_slice", "mixed", "both", "boundary_too", "two_selections", "other_axis"],
)
def test_results_that_need_all_rows(take: Callable[[Tensor], object]) -> None:
    rows = tail_rows(take)
    assert (rows.selection, rows.steps) == (None, {})
    assert rows.positions(6) is None


def test_symbolic_bounds_need_all_rows() -> None:
    assert tail_rows(lambda x: x[:, x.shape[1] // 2 :], dynamic=True).selection is None


def test_the_two_forms_of_a_decoder() -> None:
    last = analyze(captured_vlm(last_only=True)).tail_rows
    assert last.positions(10).tolist() == [9]  # type: ignore[union-attr]
    assert last.axis == 1
    assert analyze(captured_vlm(last_only=False)).tail_rows.positions(10) is None
