"""Input mutations of a functional graph, repeated on the caller's tensors in every call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.spec.mutations import Write


def inputs_allow_mutation(
    writes: Sequence[Write], in_place: Sequence[int], args: Sequence[Any], data: Sequence[int]
) -> bool:
    """True where a program may serve a call: inputs that it writes to, if any, are as it takes them to be.

    Args:
        writes: of the graph.
        in_place: indices of inputs that the program writes to by itself: these must be contiguous.
        args: the inputs of the call.
        data: indices of those that belong to the request: none that is written to may overlap another.
    """
    if not writes:
        return True
    return all(args[index].is_contiguous() for index in in_place) and not overlapping(writes, args, data)


def overlapping(writes: Sequence[Write], args: Sequence[Any], data: Sequence[int]) -> bool:
    """True where an input that is written to shares memory with another of ``data``: the graph knows of none.

    Args:
        writes: of the graph.
        args: its inputs.
        data: indices of those that belong to the request.
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
    """Write what a graph gave for its input mutations to the caller's tensors.

    Args:
        writes: of the graph.
        args: what it was called with.
        outputs: what it gave.
        count: number of the traced code's results, the first of ``outputs``.

    Returns:
        The traced code's results.
    """
    results = list(outputs[:count])
    with torch.no_grad():
        for write in writes:
            target, value = args[write.input], outputs[write.value]
            if value is None:
                pass  # written already
            elif write.dim is None or write.positions is None:
                target.copy_(value)
            else:
                target[(*[slice(None)] * write.dim, outputs[write.positions])] = value
            for place in write.results:
                results[place] = target
    return results
