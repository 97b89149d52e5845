"""Copies of graphs, and values that refer to nodes of a copy in place of the original."""

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
    """A module with a copy of the graph of ``module`` and its constants; the map is put into ``nodes``."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {} if nodes is None else nodes))
    return fx.GraphModule(module, graph, class_name)


def copy_captured(captured: Captured, nodes: dict[Node, Node] | None = None) -> Captured:
    """The same captured graph with nodes of its own; the map is put into ``nodes``."""
    return replace(captured, graph_module=copy_module(captured.graph_module, nodes))


def on_nodes(value: T, nodes: NodeMap) -> T:
    """``value`` with ``nodes[n]`` in place of each node ``n``.

    Args:
        value: a node; or tuples, lists, dicts, frozen sets and dataclasses that contain some, however nested.
            Anything else is returned as it is.
        nodes: has every node in ``value``.
    """
    return _on_nodes(value, nodes)  # type: ignore[no-any-return]


def _on_nodes(value: Any, nodes: NodeMap) -> Any:
    if isinstance(value, Node):
        return nodes[value]
    kind = type(value)
    if kind in (tuple, list, frozenset):
        return kind(_on_nodes(one, nodes) for one in value)
    if kind is dict:
        return {_on_nodes(key, nodes): _on_nodes(one, nodes) for key, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{one.name: _on_nodes(getattr(value, one.name), nodes) for one in fields(value)}
        )
    return value
