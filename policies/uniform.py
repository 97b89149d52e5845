"""Recompute the earliest tokens, the same number in every layer.

The order is from VLCache (arXiv 2512.12977): the error of a reused token is its own plus the errors that all
tokens before it pass on, so late or random rows are worth little.
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

    It has no parameter and needs no profile. ``first_k`` fixes the number of tokens instead, and the budget
    only limits it.
    """

    name: ClassVar[str] = "uniform"

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """See ``Policy.select``."""
        return (torch.arange(row_allowance(span.budget, span.length)),) * span.num_layers
