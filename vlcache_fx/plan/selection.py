"""The tokens of a prompt that results need, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputSize:
    """An integer among the inputs of a call: an integer input, or the size of a tensor.

    Attributes:
        factor: what it is multiplied by.
        input: index of the input.
        dim: the dimension that it is the size of; None for an input that is a number itself.
    """

    factor: int
    input: int
    dim: int | None = None


@dataclass(frozen=True)
class SizeSum:
    """A number that each call computes from its sizes: ``constant`` and all ``sizes``, added up."""

    constant: int
    sizes: tuple[InputSize, ...]

    def of(self, args: Sequence[Any]) -> int:
        """Its value for the inputs of one call."""
        total = self.constant
        for size in self.sizes:
            value = args[size.input]
            total += size.factor * int(value if size.dim is None else value.shape[size.dim])
        return total


@dataclass(frozen=True)
class InputPositions:
    """Token positions in an input of the call, int [n].

    Attributes:
        input: index of the input.
        from_end: negative positions count from the end; otherwise they are out of range.
    """

    input: int
    from_end: bool = True

    def of(self, num_tokens: int, args: Sequence[Any]) -> Tensor:
        """Absolute positions, int64 [n], on the CPU; not checked."""
        positions = args[self.input].detach().to(device="cpu", dtype=torch.int64)
        return torch.where(positions < 0, positions + num_tokens, positions) if self.from_end else positions


Bound: TypeAlias = int | SizeSum | None


@dataclass(frozen=True)
class RowSelection:
    """Tokens, by Python's indexing: ``[index]``, ``[start:end:step]`` or ``[positions]``.

    Attributes:
        bounds: ``(index,)``, ``(positions,)``, or ``(start, end, step)`` with None for defaults.
    """

    bounds: tuple[Bound | InputPositions, ...]

    def moved(self, inputs: Mapping[int, int]) -> RowSelection:
        """The same for other indices of inputs: ``inputs`` maps old to new."""

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
        """Absolute positions, int64 [n], on the CPU.

        Args:
            num_tokens: of the prompt.
            args: the inputs of the call, which may say the bounds.

        Raises:
            IndexError: for a single token that is not there.
        """
        first = self.bounds[0]
        if isinstance(first, InputPositions):
            return first.of(num_tokens, args)
        bounds = [bound.of(args) if isinstance(bound, SizeSum) else bound for bound in self.bounds]
        everything = torch.arange(num_tokens)
        index = slice(*bounds) if len(bounds) > 1 else bounds[0]
        return everything[index].reshape(-1)  # type: ignore[index]
