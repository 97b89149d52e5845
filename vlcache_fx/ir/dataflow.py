"""Tensor dataflow over an ``fx.Graph``: ancestors, descendants and articulation points.

Edges that carry only sizes (SymInt nodes) are not dataflow: a length says nothing about the values.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch.fx import Node

NodeSet = dict[Node, None]  # insertion-ordered, so that every result is deterministic


def carries_data(node: Node) -> bool:
    """True where the node's value is a tensor (or a tuple of tensors), not a size or the output node."""
    if node.op == "output":
        return False
    value = node.meta.get("val")
    if value is None:
        return node.op in ("placeholder", "get_attr")
    return isinstance(value, torch.Tensor | tuple | list)


def data_inputs(node: Node) -> Iterator[Node]:
    """The tensor operands of ``node``."""
    return (parent for parent in node.all_input_nodes if carries_data(parent))


def data_users(node: Node) -> Iterator[Node]:
    """The nodes that read ``node`` as a tensor and give a tensor themselves."""
    return (user for user in node.users if carries_data(user))


def reachable(
    starts: Iterable[Node], step: Callable[[Node], Iterable[Node]], within: NodeSet | None = None
) -> NodeSet:
    """``starts`` and every node that repeated ``step`` leads to (optionally without leaving ``within``)."""
    seen: NodeSet = dict.fromkeys(starts)
    stack = list(seen)
    while stack:
        for node in step(stack.pop()):
            if node not in seen and (within is None or node in within):
                seen[node] = None
                stack.append(node)
    return seen


def ancestors(nodes: Iterable[Node], within: NodeSet | None = None) -> NodeSet:
    """``nodes`` and every tensor they are computed from (optionally without leaving ``within``)."""
    return reachable(nodes, data_inputs, within)


def descendants(nodes: Iterable[Node], within: NodeSet | None = None) -> NodeSet:
    """``nodes`` and every tensor computed from them (optionally without leaving ``within``)."""
    return reachable(nodes, data_users, within)


def in_graph_order(nodes: Iterable[Node], position: dict[Node, int]) -> list[Node]:
    """``nodes`` in graph order."""
    return sorted(nodes, key=position.__getitem__)


def positions(graph: torch.fx.Graph) -> dict[Node, int]:
    """Return each node's index in the graph's (topological) order."""
    return {node: index for index, node in enumerate(graph.nodes)}


def articulation_points(
    sources: Iterable[Node], sinks: Iterable[Node], position: dict[Node, int], within: NodeSet
) -> list[Node]:
    """Nodes that lie on *every* path from any of ``sources`` to any of ``sinks`` inside ``within``.

    A node of the path set qualifies when no edge of the set jumps over it. That holds in any topological
    order: a path set node placed before an articulation point must lead through it. In graph order.
    """
    sources, sinks = list(sources), list(sinks)
    on_path = descendants(sources, within)
    members = ancestors([sink for sink in sinks if sink in on_path], on_path)
    ordered = in_graph_order(members, position)
    last_source = max((position[node] for node in sources if node in members), default=-1)
    first_sink = min((position[node] for node in sinks if node in members), default=-1)
    points = []
    reach = -1  # the farthest reader of any member seen so far
    for node in ordered:
        here = position[node]
        if reach <= here and last_source <= here <= first_sink:
            points.append(node)
        readers = [position[user] for user in data_users(node) if user in members]
        reach = max([reach, *readers])
    return points
