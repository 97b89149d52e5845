"""Small graphs of whole numbers are run on the CPU, where keys are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from vlcache_fx.ir.subgraph import on_cpu


def evaluated_on_cpu(
    part: fx.GraphModule, data_inputs: Sequence[int]
) -> tuple[Callable[..., Sequence[Any]], tuple[int, ...]]:
    """``part``, brought to the CPU where whole numbers of the request are all that it reads.

    Returns:
        What to call with the graph's inputs, on whatever device, and the indices of the inputs that it reads
        on the CPU; none where it runs on their device.
    """
    placeholders = part.graph.find_nodes(op="placeholder")
    read = {
        index: node
        for index, node in enumerate(placeholders)
        if node.users and isinstance(node.meta.get("val"), Tensor)
    }
    reads_whole_numbers = all(index in data_inputs and is_whole(node) for index, node in read.items())
    moved = on_cpu(part) if reads_whole_numbers else None
    if moved is None:
        return part, ()

    def run(*args: Any) -> Sequence[Any]:
        brought = [value.cpu() if index in read else value for index, value in enumerate(args)]
        results: Sequence[Any] = moved(*brought)
        return results

    return run, tuple(read)


def is_whole(node: fx.Node) -> bool:
    """True for a tensor of whole numbers, flags included."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
