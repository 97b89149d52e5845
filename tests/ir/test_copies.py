"""Copies of graphs and of facts about them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx
from torch.fx import Node

from vlcache_fx.ir.copies import copy_module, on_nodes


def doubled(x: Tensor, y: Tensor) -> Tensor:
    return x * 2 + y


@dataclass(frozen=True)
class Fact:
    node: Node
    parts: tuple[Node | None, ...]
    steps: dict[Node, tuple[int, Node]]
    inner: Fact | None = None
    name: str = "fact"


def test_copy_module_own_nodes() -> None:
    module = fx.symbolic_trace(doubled)
    nodes: dict[Node, Node] = {}
    copy = copy_module(module, nodes, "Copied")
    assert type(copy).__name__ == "Copied"
    assert str(copy.graph) == str(module.graph)
    assert not set(copy.graph.nodes) & set(module.graph.nodes)
    assert [(node.name, nodes[node].name) for node in nodes] == [
        (node.name, node.name) for node in module.graph.nodes if node.op != "output"
    ]
    assert set(nodes.values()) <= set(copy.graph.nodes)
    assert copy(torch.ones(1), torch.ones(1)).item() == 3


def test_on_nodes_nested() -> None:
    module = fx.symbolic_trace(doubled)
    nodes: dict[Node, Node] = {}
    copy_module(module, nodes)
    x, y, product, _ = nodes
    fact = Fact(x, (y, None), {product: (1, x)}, Fact(y, (), {}))
    moved = on_nodes(fact, nodes)
    inner = Fact(nodes[y], (), {})
    assert moved == Fact(nodes[x], (nodes[y], None), {nodes[product]: (1, nodes[x])}, inner)
    assert fact.node is x
    assert on_nodes([frozenset({x}), torch.Size([2]), "x"], nodes) == [
        frozenset({nodes[x]}), torch.Size([2]), "x",
    ]  # fmt: skip


def test_on_nodes_unmapped_node() -> None:
    module = fx.symbolic_trace(doubled)
    with pytest.raises(KeyError):
        on_nodes(tuple(module.graph.nodes), {})
