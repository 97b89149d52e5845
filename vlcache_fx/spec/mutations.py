"""Input mutations of a traced graph, and what a decoding step must know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Write:
    """What the traced code writes to one of its inputs.

    The graph is functional and returns what is written; who runs it repeats the write on the caller's tensor.

    Attributes:
        input: index of the input.
        value: index, among the graph's outputs, of what is written. A program that writes it by itself
            returns None there.
        dim: the dimension along which rows are written; None where ``value`` replaces all of the input.
        positions: index, among the outputs, of the positions of these rows along ``dim`` (int64 [rows]).
        results: indices of the results that are the input itself; the graph returns None there.
    """

    input: int
    value: int
    dim: int | None = None
    positions: int | None = None
    results: tuple[int, ...] = ()


@dataclass(frozen=True)
class DecodeStepSpec:
    """A decoding step.

    Attributes:
        writes: its input mutations, in order.
        data: indices of the inputs that are tensors of the request.
        in_place: indices of the inputs that the compiled program writes to by itself.
        num_results: number of entries that the traced code returns.
    """

    writes: tuple[Write, ...]
    data: tuple[int, ...]
    in_place: tuple[int, ...]
    num_results: int


def num_results(writes: Sequence[Write], num_outputs: int) -> int:
    """How many of a graph's outputs the traced code returns: those for its input mutations come last."""
    positions = [write.positions for write in writes if write.positions is not None]
    return min([*positions, *(write.value for write in writes)], default=num_outputs)
