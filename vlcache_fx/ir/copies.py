"""Copies of graphs, and of values that refer to their nodes."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeAlias, TypeVar

from torch import fx
from torch.fx import Node

from vlcache_fx.ir.captured import Captured

NodeMap: TypeAlias = Mapping[Node, Node]
"""From the nodes of a graph to those of its copy."""

T = TypeVar("T")


def copy_module(
    module: fx.GraphModule, nodes: dict[Node, Node] | None = None, class_name: str = "GraphModule"
) -> fx.GraphModule:
    """Return a copy of ``module`` with its own graph and shared constants; fill ``nodes`` with the map."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {} if nodes is None else nodes))
    return fx.GraphModule(module, graph, class_name)


def copy_captured(captured: Captured, nodes: dict[Node, Node] | None = None) -> Captured:
    """Return a copy of ``captured`` with nodes of its own; fill ``nodes`` with the map."""
    return replace(captured, graph_module=copy_module(captured.graph_module, nodes))


def on_nodes(value: T, nodes: NodeMap) -> T:
    """Return ``value`` with each node ``n`` replaced by ``nodes[n]``.

    Args:
        value: a node, or nested tuples, lists, dicts, frozen sets and dataclasses of nodes. Other values are
            returned unchanged.
        nodes: maps every node in ``value``.
    """
    return _on_nodes(value, nodes)  # type: ignore[no-any-return]


def _on_nodes(value: Any, nodes: NodeMap) -> Any:
    if isinstance(value, Node):
        return nodes[value]
    kind = type(value)
    if kind in (tuple, list, frozenset):
        return kind(_on_nodes(item, nodes) for item in value)
    if kind is dict:
        return {_on_nodes(key, nodes): _on_nodes(item, nodes) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{field.name: _on_nodes(getattr(value, field.name), nodes) for field in fields(value)}
        )
    return value
