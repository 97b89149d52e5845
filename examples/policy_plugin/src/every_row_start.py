"""A policy in a separate package: recompute the first tokens of picture rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlcache_fx.errors import PolicyError
from vlcache_fx.plan import row_allowance
from vlcache_fx.policies import Policy, SpanContext


@dataclass(frozen=True)
class EveryRowStart(Policy):
    """The first tokens for half of the budget, and the first token of picture rows for the rest.

    An example, not a recommendation. All layers recompute the same tokens. If the budget is too small for all
    picture rows, the upper rows have priority.

    Attributes:
        width: tokens per picture row, for pictures without a grid.
    """

    name: ClassVar[str] = "every_row_start"

    width: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.width, int) or self.width < 1:
            raise PolicyError(f"every_row_start: width must be an integer >= 1, not {self.width!r}")

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """See ``Policy.select``."""
        allowed = row_allowance(span.budget, span.length)
        chosen = torch.zeros(span.length, dtype=torch.bool)
        chosen[: (allowed + 1) // 2] = True
        width = self.width if span.grid is None else span.grid[2]
        starts = torch.arange(0, span.length, width)
        starts = starts[~chosen[starts]][: allowed // 2]
        chosen[starts] = True
        return (chosen.nonzero().flatten(),) * span.num_layers  # one object: planning is faster
