"""Ancestors, descendants, articulation points."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from vlcache_fx.ir.dataflow import (
    ancestors,
    articulation_points,
    carries_data,
    data_users,
    descendants,
    in_graph_order,
    positions,
)


def diamond(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    start = x.exp()
    joined = start.sin() + start.cos()
    end = joined.relu()
    return end, (end + y.new_ones(x.shape[0])).neg()


def nodes() -> dict[str, Node]:
    module = make_fx(diamond, tracing_mode="symbolic")(torch.ones(3), torch.ones(3))
    return {node.name: node for node in module.graph.nodes}


def names(found: object) -> list[str]:
    return [node.name for node in found]  # type: ignore[attr-defined]


def test_carries_data_sizes() -> None:
    graph = nodes()
    size = next(node for name, node in graph.items() if name.startswith("sym_size"))
    assert not carries_data(size)
    assert not carries_data(graph["output"])
    assert "new_ones" not in names(data_users(graph["x_1"]))
    assert graph["x_1"] not in ancestors([graph["new_ones"]])
    assert graph["y_1"] in ancestors([graph["new_ones"]])


def test_ancestors_and_descendants_order_and_within() -> None:
    graph = nodes()
    order = positions(graph["x_1"].graph)
    assert names(in_graph_order(descendants([graph["exp"]]), order)) == [
        "exp", "sin", "cos", "add", "relu", "add_1", "neg",
    ]  # fmt: skip
    within = {graph[name]: None for name in ("exp", "sin", "add")}
    assert names(in_graph_order(ancestors([graph["add"]], within), order)) == ["exp", "sin", "add"]


def test_articulation_points_on_every_path() -> None:
    graph = nodes()
    order = positions(graph["x_1"].graph)
    everything = dict.fromkeys(order)
    found = articulation_points([graph["x_1"]], [graph["neg"]], order, everything)
    assert names(found) == ["x_1", "exp", "add", "relu", "add_1", "neg"]
    # A sink in the middle ends the common part of all paths.
    found = articulation_points([graph["x_1"]], [graph["relu"], graph["neg"]], order, everything)
    assert names(found) == ["x_1", "exp", "add", "relu"]
    # A second source starts another.
    found = articulation_points([graph["x_1"], graph["sin"]], [graph["neg"]], order, everything)
    assert names(found) == ["add", "relu", "add_1", "neg"]


def test_articulation_points_without_path() -> None:
    graph = nodes()
    order = positions(graph["x_1"].graph)
    assert articulation_points([graph["neg"]], [graph["x_1"]], order, dict.fromkeys(order)) == []
