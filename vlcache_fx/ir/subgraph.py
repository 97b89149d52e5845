"""Take a part out of a graph, and tell what it computes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from vlcache_fx.keys.digest import content_digest


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


def on_cpu(part: fx.GraphModule) -> fx.GraphModule | None:
    """A copy that makes its tensors on the CPU, for inputs there; None where it reads constants elsewhere."""
    cpu = torch.device("cpu")
    graph = fx.Graph()
    graph.output(graph.graph_copy(part.graph, {}))
    for node in graph.nodes:
        if node.op == "get_attr":
            constant = attribute(part, str(node.target))
            if isinstance(constant, Tensor) and constant.device != cpu:
                return None
        node.args, node.kwargs = fx.node.map_aggregate(
            (node.args, dict(node.kwargs)), lambda one: cpu if isinstance(one, torch.device) else one
        )
    return fx.GraphModule(part, graph)


def computation_digest(module: fx.GraphModule, result: Node, names: Mapping[Node, str]) -> str:
    """Digest of how ``result`` is computed: equal for equal computations, in whatever graph they stand.

    Args:
        module: holds the result, and the constants that it is computed from.
        result: a node.
        names: of the placeholders that it depends on.
    """
    needed, shown = needed_for([result]), dict(names)

    def form(value: Any) -> str:
        match value:
            case Node():
                return shown[value]
            case list() | tuple():
                return f"[{', '.join(map(form, value))}]"
            case dict():
                return f"{{{', '.join(f'{key}: {form(value[key])}' for key in sorted(value))}}}"
        return repr(value)

    lines: list[str] = []
    for node in module.graph.nodes:
        if node not in needed or node.op == "placeholder":
            continue
        shown[node] = f"%{len(lines)}"
        if node.op == "get_attr":
            constant = attribute(module, str(node.target))
            lines.append(content_digest([constant]) if isinstance(constant, Tensor) else str(constant))
        else:
            lines.append(f"{node.target} {form(node.args)} {form(node.kwargs)}")
    return content_digest([*lines, shown[result]])


def attribute(owner: Any, path: str) -> Any:
    """The attribute at a dotted path."""
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner
