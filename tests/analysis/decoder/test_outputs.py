"""Rows that results need."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlcache_fx.analysis import analyze
from vlcache_fx.analysis.decoder.outputs import TailRows

from ..graphs import attend, capture, captured_vlm

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
    ids=["slice", "select", "after_ops", "first", "step"],
)
def test_find_tail_rows_constant_bounds(
    take: Callable[[Tensor], object], positions: list[int], dynamic: bool | None
) -> None:
    rows = tail_rows(take, dynamic)
    assert rows.selection is not None
    taken = rows.positions(6)
    assert taken is not None
    assert taken.tolist() == positions
    assert rows.selection not in rows.flows


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
def test_find_tail_rows_all_rows(take: Callable[[Tensor], object]) -> None:
    rows = tail_rows(take)
    assert (rows.selection, rows.flows) == (None, {})
    assert rows.positions(6) is None


def test_find_tail_rows_symbolic_bounds() -> None:
    assert tail_rows(lambda x: x[:, x.shape[1] // 2 :], dynamic=True).selection is None


@pytest.mark.parametrize(
    ("take", "positions"),
    [
        (lambda x, k: x[:, -k:], [3, 4, 5]),
        (lambda x, k: x[:, x.shape[1] - k :] + 1, [3, 4, 5]),
        (lambda x, k: x.exp()[:, k:], [3, 4, 5]),
        (lambda x, k: x[:, 1:k], [1, 2]),
        (lambda x, k: x[:, k - 1], [2]),
    ],
    ids=["last", "from_the_end", "from", "until", "single"],
)
def test_find_tail_rows_input_bounds(take: Callable[[Tensor, int], object], positions: list[int]) -> None:
    def one_layer(x: Tensor, k: int) -> object:
        x = x * 2
        return take(x + attend(x), k)

    captured = capture(one_layer, {"x": X, "k": 3}, dynamic=True)
    rows = analyze(captured).tail_rows
    values = [node.meta["val"] for node in captured.placeholders]
    args = [X if isinstance(value, Tensor) else value.node.hint for value in values]
    taken = rows.positions(6, args)
    assert taken is not None
    assert taken.tolist() == positions


@pytest.mark.parametrize(
    "take", [lambda x, positions: x[:, positions], lambda x, positions: x.index_select(1, positions)]
)
def test_find_tail_rows_input_positions(take: Callable[[Tensor, Tensor], object]) -> None:
    def one_layer(x: Tensor, positions: Tensor) -> object:
        x = x * 2
        return take(x + attend(x), positions)

    captured = capture(one_layer, {"x": X, "positions": torch.tensor([4, 0])}, dynamic=False)
    rows = analyze(captured).tail_rows
    assert rows.num_taken == 2
    args = [torch.tensor([4, 0]) if node.meta["val"].dim() == 1 else X for node in captured.placeholders]
    taken = rows.positions(6, args)
    assert taken is not None
    assert taken.tolist() == [4, 0]


def test_find_tail_rows_bool_mask() -> None:
    def one_layer(x: Tensor, flags: Tensor) -> Tensor:
        x = x * 2
        return (x + attend(x))[flags.bool()]

    for flags in (torch.ones(1, 6, dtype=torch.int64), torch.ones(1, 6, dtype=torch.bool)):
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            captured = capture(one_layer, {"x": X, "flags": flags})
        assert analyze(captured).tail_rows.selection is None


def test_find_tail_rows_of_models() -> None:
    last = analyze(captured_vlm(last_only=True)).tail_rows
    assert last.positions(10).tolist() == [9]  # type: ignore[union-attr]
    assert last.axis == 1
    assert analyze(captured_vlm(last_only=False)).tail_rows.positions(10) is None
