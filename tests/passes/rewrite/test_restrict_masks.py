"""``restrict_masks``: masks are computed for the active rows only."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from vlcache_fx.passes.rewrite import (
    RestrictMasks,
    RestrictRows,
    TrimTail,
)

from ..programs import (
    LOOKUPS,
    PassCase,
    results_without_and_with,
    small,
)

CASE = PassCase(RestrictMasks(), (*LOOKUPS, RestrictRows()))
MASKED = {"explicit_mask": True, "rope": "none"}


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("restrict_masks", CASE.shown(small(**MASKED)[0]))


def test_all_rows_equal_model() -> None:
    case = PassCase(RestrictMasks(), (*CASE.earlier, TrimTail()))
    case.check_all_rows(*small(**MASKED))


@pytest.mark.parametrize("offsets", [(), (0,), (0, 2), (1, 3, 4)], ids=str)
def test_some_rows_equal_unrestricted_masks(offsets: tuple[int, ...]) -> None:
    """Bitwise equal to a gather of the whole mask."""
    captured, graph, _ = small(**MASKED)
    results = results_without_and_with(CASE, captured, graph.calls[0], offsets)
    assert torch.equal(*results)


def test_keeps_graph_without_masks() -> None:
    assert CASE.leaves_alone(small(rope="none")[0])


def places(count: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(count)
    return at[None, None, :, None], at[None, None, None, :]


def padded(tokens: int, seen: Tensor) -> Tensor:
    """As in transformers: causal, without padding."""
    row, key = places(tokens)
    allowed = (key <= row) & seen[:, None, None, :]
    return allowed.expand(seen.shape[0], -1, tokens, tokens)


def windowed(tokens: int, seen: Tensor) -> Tensor:
    row, key = places(tokens)
    return (key <= row) & ~(key < row - 4) | (key == 0) & seen[:, None, None, :]


def broadcast(tokens: int, seen: Tensor) -> Tensor:
    """All rows read the same tokens."""
    return seen[:, None, None, :].expand(-1, 1, tokens, tokens)


def table(tokens: int, seen: Tensor) -> Tensor:
    """A slice of a square mask, which is not pointwise."""
    return torch.tril(torch.ones(tokens, tokens, dtype=torch.bool))[None, None] & seen[:, None, None, :]


def traced(mask: Callable[[int, Tensor], Tensor], samples: int) -> tuple[Any, tuple[Tensor, Tensor]]:
    """Return a graph that gathers rows of a mask, and its arguments: rows and visible tokens."""
    seen = torch.rand(samples, 12, generator=torch.Generator().manual_seed(0)) < 0.8
    rows = torch.tensor([[0, 3, 7], [2, 5, 11]])[:samples]

    def run(rows: Tensor, seen: Tensor) -> Tensor:
        whole = mask(seen.shape[1], seen)
        if samples == 1:
            return whole.index_select(2, rows)
        return torch.ops.vlcache.take_rows(whole, rows, 2, 0)

    args = (rows if samples > 1 else rows[0], seen)
    module = make_fx(run, tracing_mode="symbolic", pre_dispatch=True)(*args)
    return module, args


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("mask", [padded, windowed, broadcast])
def test_masks_of_models(mask: Callable[[int, Tensor], Tensor], samples: int) -> None:
    module, args = traced(mask, samples)
    want = module(*args)
    program: Any = SimpleNamespace(graph=module.graph)
    assert RestrictMasks().run(program)
    module.recompile()
    assert torch.equal(module(*args), want)
    sizes = [tuple(node.meta["val"].shape) for node in module.graph.nodes if is_mask(node)]
    assert not [size for size in sizes if size[-2:] == (12, 12)], sizes
    assert not RestrictMasks().run(program)


def is_mask(node: Any) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 4


@pytest.mark.parametrize("samples", [1, 2])
def test_keeps_gather_of_other_masks(samples: int) -> None:
    module, _ = traced(table, samples)
    before = str(module.graph)
    program: Any = SimpleNamespace(graph=module.graph)
    assert not RestrictMasks().run(program)
    assert str(module.graph) == before
