"""Take a part out of a graph."""

from collections.abc import Iterable, Sequence

from torch import fx
from torch.fx import Node


def needed_for(results: Iterable[Node]) -> set[Node]:
    """``results`` and every node they depend on, sizes included."""
    seen = set(results)
    stack = list(seen)
    while stack:
        for parent in stack.pop().all_input_nodes:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return seen


def extract(module: fx.GraphModule, results: Sequence[Node]) -> fx.GraphModule:
    """The part of ``module`` that computes ``results``, as a module with all the inputs of ``module``."""
    needed = needed_for(results)
    graph = fx.Graph()
    copies: dict[Node, Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    return fx.GraphModule(module, graph)
