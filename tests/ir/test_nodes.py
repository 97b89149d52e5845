"""Facts about single nodes."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from vlcache_fx.ir.nodes import NO_BOUND, attribute, is_full_slice, packet_of, slice_bounds

aten = torch.ops.aten


def test_is_full_slice() -> None:
    def slices(x: Tensor) -> tuple[Tensor, ...]:
        end = NO_BOUND
        return (
            aten.slice(x, 1, 0, end),
            aten.slice(x, 1),
            aten.slice(x, 1, 1, end),
            aten.slice(x, 1, 0, end, 2),
        )

    nodes = [node for node in make_fx(slices)(torch.ones(2, 3)).graph.nodes if node.op == "call_function"]
    assert [is_full_slice(node) for node in nodes] == [True, True, False, False]


def test_slice_bounds_slice_and_scatter() -> None:
    def both(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return aten.slice(x, 1, 1), aten.slice_scatter(x, y, 1, 0, NO_BOUND)

    graph = make_fx(both)(torch.ones(2, 3), torch.ones(2, 3)).graph
    first, second = [node for node in graph.nodes if node.op == "call_function"]
    assert slice_bounds(first)[:2] == (1, 1)
    assert slice_bounds(second) == (1, 0, NO_BOUND, 1)
    assert is_full_slice(second)
    assert packet_of(second) is aten.slice_scatter


def test_attribute_dotted_path() -> None:
    root = torch.nn.Module()
    root.inner = torch.nn.Module()
    root.inner.register_buffer("held", torch.ones(2))
    graph = fx.Graph()
    node = graph.get_attr("inner.held")
    graph.output(node)
    assert attribute(fx.GraphModule(root, graph), node) is root.inner.held
