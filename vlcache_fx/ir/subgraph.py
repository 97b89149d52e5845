"""Parts of graphs, as graphs of their own."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx
from torch.fx import Node

from vlcache_fx.ir.copies import copy_module
from vlcache_fx.ir.dataflow import reachable
from vlcache_fx.ir.nodes import attribute


def needed_for(results: Iterable[Node]) -> set[Node]:
    """Return ``results`` and every node that they depend on, sizes included."""
    return set(reachable(results, lambda node: node.all_input_nodes))


def extract(module: fx.GraphModule, results: Sequence[Node]) -> fx.GraphModule:
    """Return the part of ``module`` that computes ``results``, as a module with all inputs of ``module``."""
    needed = needed_for(results)
    graph = fx.Graph()
    copies: dict[Node, Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    return fx.GraphModule(module, graph)


def on_cpu(part: fx.GraphModule) -> fx.GraphModule | None:
    """Return a copy that computes on the CPU; None if it reads constants of another device."""
    cpu = torch.device("cpu")
    copy = copy_module(part)
    for node in copy.graph.nodes:
        if node.op == "get_attr":
            constant = attribute(part, node)
            if isinstance(constant, Tensor) and constant.device != cpu:
                return None
        node.args, node.kwargs = fx.node.map_aggregate(
            (node.args, dict(node.kwargs)), lambda value: cpu if isinstance(value, torch.device) else value
        )
    copy.recompile()
    return copy
