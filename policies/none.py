"""Recompute nothing: the lower bound for the other policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlcache_fx.policies.base import Policy, SpanContext


@dataclass(frozen=True)
class NoRows(Policy):
    """No rows in any layer: the donor's keys and values are used unchanged."""

    name: ClassVar[str] = "none"

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """See ``Policy.select``."""
        return (torch.empty(0, dtype=torch.int64),) * span.num_layers
