"""Digests of computations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from vlcache_fx.ir.digest import computation_digest, graph_digest


def digest(function: Callable[..., Any], result: int | None = None, **names: str) -> str:
    """The digest of a function's result (or of one of several), with names for its parameters."""
    traced = fx.symbolic_trace(function)
    value: Any = traced.graph.output_node().args[0]
    placeholders = traced.graph.find_nodes(op="placeholder")
    given = {node: names.get(str(node.target), str(node.target)) for node in placeholders}
    return computation_digest(traced, value if result is None else value[result], given)


def plain(x: Tensor, y: Tensor) -> Any:
    return torch.cat([x * 2.0, y.exp()], dim=1)


def among_others(y: Tensor, z: Tensor, x: Tensor) -> Any:
    noise = z.sin()
    first = x * 2.0
    other = noise + first
    second = y.exp()
    return other, torch.cat([first, second], dim=1), noise


def test_computation_digest_equal_computations() -> None:
    want = digest(plain)
    assert digest(among_others, 1) == want
    assert digest(lambda a, b: torch.cat([a * 2.0, b.exp()], dim=1), a="x", b="y") == want


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: torch.cat([y * 2.0, x.exp()], dim=1),
        lambda x, y: torch.cat([y.exp(), x * 2.0], dim=1),
        lambda x, y: torch.cat([x * 2.5, y.exp()], dim=1),
        lambda x, y: torch.cat([x * 2.0, y.exp()], dim=0),
        lambda x, y: torch.cat([x * 2.0, y.exp2()], dim=1),
        lambda x, y: torch.cat([x * 2.0, x.exp()], dim=1),
        lambda x, y: torch.cat([x * 2.0, y.exp(), y], dim=1),
        lambda x, y: torch.cat([x * 2.0, y.exp()], dim=1) + 0,
    ],
    ids=["inputs", "order", "number", "keyword", "operator", "one input", "one more", "after it"],
)  # fmt: skip
def test_computation_digest_other_computations(function: Callable[..., Any]) -> None:
    assert digest(function) != digest(plain)


def test_computation_digest_input_names() -> None:
    assert digest(plain, x="y", y="x") != digest(plain)
    assert digest(lambda x: x) != digest(lambda y: y)
    assert digest(lambda x: x) == digest(lambda y: y, y="x")


def holding(value: Any) -> torch.nn.Module:
    class Holding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Module()
            self.inner.register_buffer("held", value)

        def forward(self, x: Tensor) -> Any:
            return x + self.inner.held

    return Holding()


def test_computation_digest_constants_by_content() -> None:
    ones = digest(holding(torch.ones(2)))
    assert digest(holding(torch.ones(2))) == ones
    assert digest(holding(torch.ones(2) * 2)) != ones
    assert digest(holding(torch.ones(2, dtype=torch.float64))) != ones


def test_graph_digest_constants_and_names() -> None:
    def traced(value: Tensor) -> fx.GraphModule:
        return fx.symbolic_trace(holding(value))

    renamed = traced(torch.ones(2))
    renamed.graph.find_nodes(op="placeholder")[0].name = "other"
    assert graph_digest(traced(torch.ones(2))) == graph_digest(renamed)
    assert graph_digest(traced(torch.ones(2))) != graph_digest(traced(torch.zeros(2)))


def test_computation_digest_higher_order_operator() -> None:
    """Functions that a graph calls, as flex attention does, count with their constants."""

    def calling(value: float) -> tuple[fx.GraphModule, fx.Node]:
        graph = fx.Graph()
        x = graph.placeholder("x")
        body = graph.get_attr("body")
        result = graph.call_function(torch.ops.higher_order.flex_attention, (x, body))
        graph.output(result)
        root = torch.nn.Module()
        root.body = fx.symbolic_trace(holding(torch.tensor(value)))
        return fx.GraphModule(root, graph), result

    def of(value: float) -> str:
        module, result = calling(value)
        (x,) = module.graph.find_nodes(op="placeholder")
        return computation_digest(module, result, {x: "x"})

    assert of(1.0) == of(1.0)
    assert of(1.0) != of(2.0)
