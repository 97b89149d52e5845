"""Which tokens of a prompt results are made of, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowSelection:
    """Tokens that are taken as Python's brackets take them: ``[index]`` or ``[start:end:step]``.

    Attributes:
        bounds: ``(index,)``, or ``(start, end, step)`` with None where nothing is said.
    """

    bounds: tuple[int | None, ...]

    def positions(self, num_tokens: int) -> Tensor:
        """Absolute positions, int64 [n]."""
        everything = torch.arange(num_tokens)
        if len(self.bounds) == 1:
            return everything[self.bounds[0]].reshape(1)
        return everything[slice(*self.bounds)]
