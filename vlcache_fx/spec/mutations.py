"""Specs of input mutations and of decoding steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Write:
    """An input mutation: a write of the traced code to one of its inputs.

    The graph is functional and returns the written value; the runtime repeats the write on the caller's
    tensor.

    Attributes:
        input: index of the input.
        value: output index of the written value; the output is None if the program wrote it itself.
        dim: the dimension along which rows are written; None where ``value`` replaces the whole input.
        positions: output index of the positions of these rows along ``dim``, int64 [rows].
        results: indices of results that are the input itself; the graph returns None for them.
    """

    input: int
    value: int
    dim: int | None = None
    positions: int | None = None
    results: tuple[int, ...] = ()


@dataclass(frozen=True)
class DecodeStepSpec:
    """Spec of a decoding step.

    Attributes:
        writes: input mutations, in order.
        data: indices of inputs that are tensors of the request.
        in_place: indices of inputs that the program writes to itself.
        num_results: number of results of the traced code.
    """

    writes: tuple[Write, ...]
    data: tuple[int, ...]
    in_place: tuple[int, ...]
    num_results: int


def num_results(writes: Sequence[Write], num_outputs: int) -> int:
    """Return the number of results among a graph's outputs; those for input mutations come last."""
    positions = [write.positions for write in writes if write.positions is not None]
    return min([*positions, *(write.value for write in writes)], default=num_outputs)
