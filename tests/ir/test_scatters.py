"""Writes of consecutive rows become ``index_copy``; other writes are not changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from vlcache_fx.ir.scatters import canonicalize_slice_scatters, scattered_rows

aten = torch.ops.aten
Write = Callable[[Tensor, Tensor], Tensor]
WHOLE, ROWS = torch.arange(48.0).view(2, 6, 4), -torch.ones(2, 3, 4)


def traced(write: Write, rows: Tensor = ROWS) -> fx.GraphModule:
    def run(whole: Tensor, rows: Tensor) -> Tensor:
        return write(whole.clone(), rows)

    module = make_fx(functionalize(run), tracing_mode="symbolic")(WHOLE, rows)
    assert isinstance(module, fx.GraphModule)
    return module


def scatters(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target is aten.index_copy.default]


def between(start: int | None, end: int | None) -> Write:
    def write(whole: Tensor, rows: Tensor) -> Tensor:
        whole[:, start:end] = rows
        return whole

    return write


@given(st.integers(-6, 5), st.integers(1, 6))
def test_canonicalize_slice_scatters_consecutive_rows(start: int, count: int) -> None:
    first = start % 6
    count = min(count, 6 - first)
    end = None if first + count == 6 else first + count - (6 if start < 0 else 0)
    rows = torch.rand(2, count, 4, generator=torch.Generator().manual_seed(0))
    module = traced(between(start, end), rows)
    want = module(WHOLE, rows)
    canonicalize_slice_scatters(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    assert torch.equal(module(WHOLE, rows), want)
    targets = {node.target for node in module.graph.nodes}
    assert not targets & {aten.slice_scatter.default, aten.copy.default}
    if count < 6:
        (scatter,) = scatters(module)
        found = scattered_rows(scatter)
        assert found is not None
        assert found[1] == 1


def every_second(whole: Tensor, rows: Tensor) -> Tensor:
    whole[:, ::2] = rows
    return whole


def nothing(whole: Tensor, rows: Tensor) -> Tensor:
    return whole + rows.sum()


@pytest.mark.parametrize("write", [every_second, nothing])
def test_canonicalize_slice_scatters_other_writes(write: Write) -> None:
    module = traced(write)
    want = module(WHOLE, ROWS)
    canonicalize_slice_scatters(module.graph)
    module.recompile()
    assert torch.equal(module(WHOLE, ROWS), want)
    assert not scatters(module)


def copied(whole: Tensor, rows: Tensor) -> Tensor:
    return whole.index_copy(-2, torch.tensor([4, 0, 2]), rows)


def put_rows(whole: Tensor, rows: Tensor, accumulate: bool = False) -> Tensor:
    result: Tensor = aten.index_put(whole, [None, torch.tensor([4, 0, 2])], rows, accumulate)
    return result


def put(whole: Tensor, rows: Tensor) -> Tensor:
    return put_rows(whole, rows)


def repeated(whole: Tensor, rows: Tensor) -> Tensor:
    return put_rows(whole, rows[..., :1])


def added(whole: Tensor, rows: Tensor) -> Tensor:
    return put_rows(whole, rows, True)


def single_values(whole: Tensor, rows: Tensor) -> Tensor:
    return whole.index_put((torch.tensor([0, 1, 0]), torch.tensor([4, 0, 2])), rows[0])


@pytest.mark.parametrize(
    ("write", "is_rows"),
    [(copied, True), (put, True), (repeated, False), (added, False), (single_values, False)],
)
def test_scattered_rows(write: Write, is_rows: bool) -> None:
    nodes = traced(write).graph.nodes
    (scatter,) = (node for node in nodes if node.target in (aten.index_copy.default, aten.index_put.default))
    found = scattered_rows(scatter)
    assert (found is not None) == is_rows
    if found is not None:
        source, dim, places = found
        assert (source.meta["val"].shape, dim, places.meta["val"].shape) == (ROWS.shape, 1, (3,))
