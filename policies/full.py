"""Recompute everything: the oracle that the other policies are measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlcache_fx.policies.base import Policy
from vlcache_fx.policies.profile import Profile


@dataclass(frozen=True)
class Full(Policy):
    """All rows in all layers, whatever the budget and the prefix: equals the unmodified model."""

    name: ClassVar[str] = "full"
    ignores_budget: ClassVar[bool] = True
    keeps_prefix: ClassVar[bool] = False

    def select(
        self, span_length: int, num_layers: int, profile: Profile | None, budget: float
    ) -> Sequence[Tensor]:
        """See ``Policy.select``; the profile and the budget play no part."""
        return (torch.arange(span_length),) * num_layers
