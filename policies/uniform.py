"""Spend the budget evenly over the layers, on the earliest tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlcache_fx.plan.budget import row_allowance
from vlcache_fx.policies.base import Policy
from vlcache_fx.policies.profile import Profile


@dataclass(frozen=True)
class Uniform(Policy):
    """The same number of rows in every layer: the budget's share of the span, earliest tokens first.

    It has no parameter: it is what the budget buys without knowing the model. ``first_k`` fixes how many
    tokens instead and treats the budget as a cap only. Earliest first, because the error of a reused token is
    its own plus what every token before it passes on (VLCache, arXiv 2512.12977): random or late rows buy
    nothing.
    """

    name: ClassVar[str] = "uniform"

    def select(
        self, span_length: int, num_layers: int, profile: Profile | None, budget: float
    ) -> Sequence[Tensor]:
        """See ``Policy.select``; the profile plays no part."""
        return (torch.arange(row_allowance(budget, span_length)),) * num_layers
