"""Which tokens of a prompt results are made of, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputSize:
    """A whole number among the inputs of a call: an input that is one, or the size of a tensor.

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
    """The places that an input of the call holds, int [n].

    Attributes:
        input: index of the input.
        from_end: negative places count from the end; otherwise they are as wrong as those behind the end.
    """

    input: int
    from_end: bool = True

    def of(self, num_tokens: int, args: Sequence[Any]) -> Tensor:
        """The places from the beginning, int64 [n], on the CPU; not checked."""
        places = args[self.input].detach().to(device="cpu", dtype=torch.int64)
        return torch.where(places < 0, places + num_tokens, places) if self.from_end else places


Bound: TypeAlias = int | SizeSum | None


@dataclass(frozen=True)
class RowSelection:
    """Tokens, taken as Python's brackets take them: ``[index]``, ``[start:end:step]`` or ``[places]``.

    Attributes:
        bounds: ``(index,)``, ``(places,)``, or ``(start, end, step)`` with None where nothing is said.
    """

    bounds: tuple[Bound | InputPositions, ...]

    def moved(self, inputs: Mapping[int, int]) -> RowSelection:
        """The same, where the input at each index is at another one."""

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
        place = slice(*bounds) if len(bounds) > 1 else bounds[0]
        return everything[place].reshape(-1)  # type: ignore[index]
