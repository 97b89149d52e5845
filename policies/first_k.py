"""Recompute the first k tokens of a span, as position-independent caching systems do.

MPIC (arXiv 2502.01960) recomputes the first k tokens of every image, with k a constant; EPIC (arXiv
2410.15332) does it for text chunks, whose first tokens act as attention sinks when they were computed at
position 0.
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
class FirstK(Policy):
    """The first k tokens in every layer.

    The budget still limits them: ``FirstK(tokens=32)`` on a span of 400 tokens needs a budget of at least
    0.08; otherwise the plan drops the latest rows, and the report lists this as a repair.

    Attributes:
        tokens: k, an integer >= 0, or None. Default: None.
        share: k as a share of the span, a number in [0, 1], or None; rounded down, but to at least one row
            unless it is 0. If both are None, the share is the budget. Default: None.
    """

    name: ClassVar[str] = "first_k"

    tokens: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.share is not None:
            raise PolicyError("first_k takes tokens or share, not both")
        if self.tokens is not None and (isinstance(self.tokens, bool) or self.tokens < 0):
            raise PolicyError(f"first_k: tokens must be an integer >= 0, not {self.tokens!r}")
        if self.share is not None and not 0 <= self.share <= 1:
            raise PolicyError(f"first_k: share must be in [0, 1], not {self.share!r}")

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """See ``Policy.select``."""
        if self.tokens is not None:
            count = min(self.tokens, span.length)
        else:
            count = row_allowance(span.budget if self.share is None else self.share, span.length)
        return (torch.arange(count),) * span.num_layers
