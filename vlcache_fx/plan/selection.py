"""Token positions that a graph's outputs depend on, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputSize:
    """An integer from the inputs of a call, times a factor: an integer input, or the size of a tensor.

    Attributes:
        factor: multiplier of the integer.
        input: index of the input.
        dim: dimension of the tensor; None for an integer input.
    """

    factor: int
    input: int
    dim: int | None = None


@dataclass(frozen=True)
class SizeSum:
    """The sum of ``constant`` and all ``sizes``, computed in each call."""

    constant: int
    sizes: tuple[InputSize, ...]

    def of(self, args: Sequence[Any]) -> int:
        """Return the value for the inputs of one call."""
        total = self.constant
        for size in self.sizes:
            value = args[size.input]
            total += size.factor * int(value if size.dim is None else value.shape[size.dim])
        return total


@dataclass(frozen=True)
class InputPositions:
    """Positions from an input of the call, int [n].

    Attributes:
        input: index of the input.
        from_end: whether negative positions count from the end; otherwise they are invalid.
    """

    input: int
    from_end: bool = True

    def of(self, num_tokens: int, args: Sequence[Any]) -> Tensor:
        """Return positions from the start, int64 [n], on the CPU; not checked."""
        positions = args[self.input].detach().to(device="cpu", dtype=torch.int64)
        return torch.where(positions < 0, positions + num_tokens, positions) if self.from_end else positions


Bound: TypeAlias = int | SizeSum | None


@dataclass(frozen=True)
class RowSelection:
    """Tokens selected as by Python's ``[index]``, ``[start:end:step]`` or ``[positions]``.

    Attributes:
        bounds: ``(index,)``, ``(positions,)``, or ``(start, end, step)`` with None for omitted bounds.
    """

    bounds: tuple[Bound | InputPositions, ...]

    def moved(self, inputs: Mapping[int, int]) -> RowSelection:
        """Return the selection with input indices replaced by ``inputs`` (old index -> new index)."""

        def moved(bound: Bound | InputPositions) -> Bound | InputPositions:
            match bound:
                case InputPositions():
                    return replace(bound, input=inputs[bound.input])
                case SizeSum():
                    sizes = tuple(replace(size, input=inputs[size.input]) for size in bound.sizes)
                    return replace(bound, sizes=sizes)
            return bound

        return RowSelection(tuple(map(moved, self.bounds)))

    def positions(self, num_tokens: int, args: Sequence[Any] = ()) -> Tensor:
        """Return absolute positions, int64 [n], on the CPU.

        Args:
            num_tokens: number of tokens of the prompt.
            args: inputs of the call, for bounds that depend on them.

        Raises:
            IndexError: a single index is out of range.
        """
        first = self.bounds[0]
        if isinstance(first, InputPositions):
            return first.of(num_tokens, args)
        bounds = [bound.of(args) if isinstance(bound, SizeSum) else bound for bound in self.bounds]
        index = slice(*bounds) if len(bounds) > 1 else bounds[0]
        return torch.arange(num_tokens)[index].reshape(-1)  # type: ignore[index]
