"""Moves small integer programs to the CPU, where keys are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from vlcache_fx.ir.subgraph import on_cpu


def evaluated_on_cpu(
    part: fx.GraphModule, data_inputs: Sequence[int]
) -> tuple[Callable[..., Sequence[Any]], tuple[int, ...]]:
    """Move ``part`` to the CPU if it reads only integer and bool tensors of the request.

    Returns:
        A callable that takes the graph's inputs on any device, and the indices of the inputs that it reads on
        the CPU; no indices where it runs on their device.
    """
    placeholders = part.graph.find_nodes(op="placeholder")
    read = {
        index: node
        for index, node in enumerate(placeholders)
        if node.users and isinstance(node.meta.get("val"), Tensor)
    }
    reads_integers = all(index in data_inputs and is_integral(node) for index, node in read.items())
    moved = on_cpu(part) if reads_integers else None
    if moved is None:
        return part, ()

    def run(*args: Any) -> Sequence[Any]:
        copied = [value.cpu() if index in read else value for index, value in enumerate(args)]
        results: Sequence[Any] = moved(*copied)
        return results

    return run, tuple(read)


def is_integral(node: fx.Node) -> bool:
    """Return True for an integer or bool tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
