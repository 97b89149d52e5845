"""Recompute everything: the reference for the other policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlcache_fx.policies.base import Policy, SpanContext


@dataclass(frozen=True)
class Full(Policy):
    """All rows in all layers, whatever the budget and the prefix: the result of the unmodified model."""

    name: ClassVar[str] = "full"
    ignores_budget: ClassVar[bool] = True
    keeps_prefix: ClassVar[bool] = False

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """See ``Policy.select``."""
        return (torch.arange(span.length),) * span.num_layers
