"""Recompute random rows: the control for policies that choose rows by a rule.

VLCache (arXiv 2512.12977) argues that a reused token's error reaches every token after it, so the earliest
rows are worth most. The same number of random rows measures the worth of this choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlcache_fx.errors import PolicyError
from vlcache_fx.plan.budget import row_allowance
from vlcache_fx.policies.base import Policy, SpanContext


@dataclass(frozen=True)
class Random(Policy):
    """The budget's share of the span's rows, drawn at random, the same in every layer: a control.

    Spans of equal length get the same rows, and a larger budget adds rows to them.

    Attributes:
        seed: seed of the draw, an integer in [0, 2**63). Default: 0.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise PolicyError(f"random: seed must be an integer in [0, 2**63), not {self.seed!r}")

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """See ``Policy.select``."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(span.length, generator=generator)[: row_allowance(span.budget, span.length)]
        return (drawn.sort().values,) * span.num_layers
