"""Tensor dataflow over an ``fx.Graph``: ancestors, descendants and articulation points.

Edges of sizes (SymInt nodes) are not dataflow: a length says nothing about values.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch.fx import Node

NodeSet = dict[Node, None]  # insertion-ordered, so that every result is deterministic


def carries_data(node: Node) -> bool:
    """Return True if the node's value is a tensor or a tuple of tensors, not a size or the output node."""
    if node.op == "output":
        return False
    value = node.meta.get("val")
    if value is None:
        return node.op in ("placeholder", "get_attr")
    return isinstance(value, torch.Tensor | tuple | list)


def data_inputs(node: Node) -> Iterator[Node]:
    """Return the tensor operands of ``node``."""
    return (parent for parent in node.all_input_nodes if carries_data(parent))


def data_users(node: Node) -> Iterator[Node]:
    """Return the users of ``node`` with tensor results."""
    return (user for user in node.users if carries_data(user))


def reachable(
    starts: Iterable[Node], step: Callable[[Node], Iterable[Node]], within: NodeSet | None = None
) -> NodeSet:
    """Return ``starts`` and every node that repeated ``step`` reaches, optionally ``within`` a set alone."""
    seen: NodeSet = dict.fromkeys(starts)
    stack = list(seen)
    while stack:
        for node in step(stack.pop()):
            if node not in seen and (within is None or node in within):
                seen[node] = None
                stack.append(node)
    return seen


def ancestors(nodes: Iterable[Node], within: NodeSet | None = None) -> NodeSet:
    """Return ``nodes`` and every tensor that they are computed from, optionally ``within`` a set alone."""
    return reachable(nodes, data_inputs, within)


def descendants(nodes: Iterable[Node], within: NodeSet | None = None) -> NodeSet:
    """Return ``nodes`` and every tensor computed from them, optionally ``within`` a set alone."""
    return reachable(nodes, data_users, within)


def in_graph_order(nodes: Iterable[Node], position: dict[Node, int]) -> list[Node]:
    """Return ``nodes`` in graph order; ``position`` as from ``positions``."""
    return sorted(nodes, key=position.__getitem__)


def positions(graph: torch.fx.Graph) -> dict[Node, int]:
    """Return each node's index in the graph's (topological) order."""
    return {node: index for index, node in enumerate(graph.nodes)}


def articulation_points(
    sources: Iterable[Node], sinks: Iterable[Node], position: dict[Node, int], within: NodeSet
) -> list[Node]:
    """Return the nodes on *every* path inside ``within`` from a source to a sink, in graph order.

    A node on a path qualifies if no edge between nodes on paths jumps over it. This holds in any topological
    order: paths from nodes before an articulation point lead through it.
    """
    sources, sinks = list(sources), list(sinks)
    on_path = descendants(sources, within)
    members = ancestors([sink for sink in sinks if sink in on_path], on_path)
    ordered = in_graph_order(members, position)
    last_source = max((position[node] for node in sources if node in members), default=-1)
    first_sink = min((position[node] for node in sinks if node in members), default=-1)
    points = []
    reach = -1  # the last reader of the members so far
    for node in ordered:
        here = position[node]
        if reach <= here and last_source <= here <= first_sink:
            points.append(node)
        readers = [position[user] for user in data_users(node) if user in members]
        reach = max([reach, *readers])
    return points
