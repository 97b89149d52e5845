"""Input mutations: checked before a call, applied to the caller's tensors after it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.spec.mutations import Write


def inputs_allow_mutation(
    writes: Sequence[Write], in_place: Sequence[int], args: Sequence[Any], data: Sequence[int]
) -> bool:
    """Return True if the inputs that a program mutates have the layout that it assumes.

    Args:
        writes: input mutations of the graph.
        in_place: indices of inputs that the program writes to itself; they must be contiguous.
        args: the graph's inputs.
        data: indices of tensors of the request; a mutated input must not overlap any other.
    """
    if not writes:
        return True
    return all(args[index].is_contiguous() for index in in_place) and not overlapping(writes, args, data)


def overlapping(writes: Sequence[Write], args: Sequence[Any], data: Sequence[int]) -> bool:
    """Return True if a mutated input shares memory with another in ``data``; the graph assumes none does.

    Args:
        writes: input mutations of the graph.
        args: the graph's inputs.
        data: indices of tensors of the request.
    """
    written = {write.input for write in writes}
    ranges = sorted(
        (*_memory(args[index]), index in written) for index in data if isinstance(args[index], Tensor)
    )
    end, last_written = 0, False
    for first, after, is_written in ranges:
        if first < end and (is_written or last_written):
            return True
        if after > end:
            end, last_written = after, is_written
    return False


def _memory(value: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    first = value.data_ptr()
    return first, first + (last + 1) * value.element_size() if value.numel() else first


def apply_input_mutations(
    writes: Sequence[Write], args: Sequence[Any], outputs: Sequence[Any], count: int
) -> Sequence[Any]:
    """Apply a graph's input mutations to the caller's tensors.

    Args:
        writes: input mutations of the graph.
        args: the graph's inputs.
        outputs: the graph's outputs.
        count: number of the traced code's results, which come first in ``outputs``.

    Returns:
        The traced code's results.
    """
    results = list(outputs[:count])
    with torch.no_grad():
        for write in writes:
            target, value = args[write.input], outputs[write.value]
            if value is None:
                pass  # the program wrote it
            elif write.dim is None or write.positions is None:
                target.copy_(value)
            else:
                target[(*[slice(None)] * write.dim, outputs[write.positions])] = value
            for index in write.results:
                results[index] = target
    return results
