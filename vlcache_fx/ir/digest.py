"""Digests of computations: equal for equal computations in different graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from vlcache_fx.ir.nodes import attribute
from vlcache_fx.keys.digest import content_digest


def computation_digest(module: fx.GraphModule, result: Node, names: Mapping[Node, str]) -> str:
    """Return the digest of the computation of ``result``.

    Args:
        module: owns ``result`` and the constants that it depends on.
        result: a node.
        names: names of the placeholders that it depends on.
    """
    return content_digest([ComputationWriter(module, names).text(result)])


class ComputationWriter:
    """Writer of nodes as text, each from the texts of its operands.

    Operators, arguments and constants are written; names and the order of independent operators are not.
    Subclasses leave out more.

    Args:
        module: owns the graph and its constants.
        names: texts of some nodes, such as placeholders.
    """

    def __init__(self, module: fx.GraphModule, names: Mapping[Node, str]) -> None:
        self.module = module
        self.texts = dict(names)

    def text(self, result: Node) -> str:
        """Return the text of ``result``: a digest, so its length does not grow with the graph."""
        stack = [result]
        while stack:
            node = stack[-1]
            if node in self.texts:
                stack.pop()
                continue
            waiting = [operand for operand in self.reads(node) if operand not in self.texts]
            if waiting:
                stack.extend(reversed(waiting))
            else:
                self.texts[node] = self.write(stack.pop())
        return self.texts[result]

    def reads(self, node: Node) -> Sequence[Node]:
        """Return the nodes whose texts ``write`` needs, in order."""
        return node.all_input_nodes

    def write(self, node: Node) -> str:
        """Return the text of a node; ``texts`` has those of ``reads(node)``."""
        if node.op == "get_attr":
            return constant_text(attribute(self.module, node))
        arguments = [argument_text(value, self._leaf) for value in (node.args, node.kwargs)]
        return content_digest([target_text(node.target), *arguments])

    def _leaf(self, value: Any) -> str:
        return self.texts[value] if isinstance(value, Node) else repr(value)


def constant_text(value: Any) -> str:
    """Return the text of a constant: a tensor, the body of a higher-order operator, or a plain value."""
    if isinstance(value, Tensor):
        return content_digest([value])
    return graph_digest(value) if isinstance(value, fx.GraphModule) else repr(value)


def graph_digest(module: fx.GraphModule) -> str:
    """Return the digest of all outputs of ``module``, as functions of its inputs."""
    inputs = module.graph.find_nodes(op="placeholder")
    writer = ComputationWriter(module, {node: f"input {index}" for index, node in enumerate(inputs)})
    output = module.graph.output_node()
    return content_digest([
        argument_text(output.args, lambda leaf: writer.text(leaf) if isinstance(leaf, Node) else repr(leaf))
    ])  # fmt: skip


def target_text(target: Any) -> str:
    """Return the text of a node's target, without memory addresses."""
    if isinstance(target, str | torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        return str(target)
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", "")
    return f"{getattr(target, '__module__', '')}.{name}"


def argument_text(value: Any, leaf: Callable[[Any], str]) -> str:
    """Return the text of a nested argument; ``leaf`` writes nodes and plain values. Lists equal tuples."""
    match value:
        case list() | tuple():
            return f"[{', '.join(argument_text(item, leaf) for item in value)}]"
        case dict():
            return f"{{{', '.join(f'{key}: {argument_text(value[key], leaf)}' for key in sorted(value))}}}"
        case slice():
            return f"slice{argument_text((value.start, value.stop, value.step), leaf)}"
    return leaf(value)
