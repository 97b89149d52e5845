"""Recompute the earliest tokens, as many in every layer as the budget allows.

VLCache (arXiv 2512.12977) is the source of the order: the error of a reused token is its own plus what every
token before it passes on, so that late or random rows buy little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlcache_fx.plan.budget import row_allowance
from vlcache_fx.policies.base import Policy, SpanContext


@dataclass(frozen=True)
class Uniform(Policy):
    """The same number of rows in every layer: the budget's share of the span, earliest tokens first.

    It has no parameter: it is what the budget buys without knowing the model. ``first_k`` fixes the number of
    tokens instead, and the budget only caps it.
    """

    name: ClassVar[str] = "uniform"

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """See ``Policy.select``."""
        return (torch.arange(row_allowance(span.budget, span.length)),) * span.num_layers
