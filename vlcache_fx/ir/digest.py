"""Digests of how values of a graph are computed: equal for equal computations, whatever the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from vlcache_fx.ir.nodes import attribute
from vlcache_fx.keys.digest import content_digest


def computation_digest(module: fx.GraphModule, result: Node, names: Mapping[Node, str]) -> str:
    """Digest of how ``result`` is computed.

    Args:
        module: holds the result, and the constants that it is computed from.
        result: a node.
        names: of the placeholders that it depends on.
    """
    return content_digest([ComputationWriter(module, names).text(result)])


class ComputationWriter:
    """Writes nodes as text, each from the texts of the nodes that it reads.

    Every operator, argument and constant is written; names, and the order of independent operators, are not.
    A subclass says what else changes no value.

    Args:
        module: owns the graph and its constants.
        names: texts of nodes that are known from the start.
    """

    def __init__(self, module: fx.GraphModule, names: Mapping[Node, str]) -> None:
        self.module = module
        self.texts = dict(names)

    def text(self, result: Node) -> str:
        """The text of ``result``; short, however much it depends on."""
        stack = [result]
        while stack:
            node = stack[-1]
            if node in self.texts:
                stack.pop()
                continue
            waiting = [one for one in self.reads(node) if one not in self.texts]
            if waiting:
                stack.extend(reversed(waiting))
            else:
                self.texts[node] = self.write(stack.pop())
        return self.texts[result]

    def reads(self, node: Node) -> Sequence[Node]:
        """The nodes whose texts ``write`` needs, in order."""
        return node.all_input_nodes

    def write(self, node: Node) -> str:
        """The text of a node; ``texts`` has those of the nodes that it reads."""
        if node.op == "get_attr":
            return constant_text(attribute(self.module, node))
        given = [argument_text(one, self._leaf) for one in (node.args, node.kwargs)]
        return content_digest([target_text(node.target), *given])

    def _leaf(self, value: Any) -> str:
        return self.texts[value] if isinstance(value, Node) else repr(value)


def constant_text(value: Any) -> str:
    """A constant by its content: a tensor, the body of a higher-order operator, or a plain value."""
    if isinstance(value, Tensor):
        return content_digest([value])
    return graph_digest(value) if isinstance(value, fx.GraphModule) else repr(value)


def graph_digest(module: fx.GraphModule) -> str:
    """Digest of everything that ``module`` returns, as a function of its inputs."""
    inputs = module.graph.find_nodes(op="placeholder")
    writer = ComputationWriter(module, {node: f"input {index}" for index, node in enumerate(inputs)})
    output = module.graph.output_node()
    return content_digest([
        argument_text(output.args, lambda one: writer.text(one) if isinstance(one, Node) else repr(one))
    ])  # fmt: skip


def target_text(target: Any) -> str:
    """What a node calls; without addresses in memory."""
    if isinstance(target, str | torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        return str(target)
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", "")
    return f"{getattr(target, '__module__', '')}.{name}"


def argument_text(value: Any, leaf: Callable[[Any], str]) -> str:
    """An argument, however nested; ``leaf`` writes nodes and plain values. Lists and tuples are alike."""
    match value:
        case list() | tuple():
            return f"[{', '.join(argument_text(one, leaf) for one in value)}]"
        case dict():
            return f"{{{', '.join(f'{key}: {argument_text(value[key], leaf)}' for key in sorted(value))}}}"
        case slice():
            return f"slice{argument_text((value.start, value.stop, value.step), leaf)}"
    return leaf(value)
