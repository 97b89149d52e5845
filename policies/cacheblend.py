"""Recompute the rows whose keys and values differ most from the donor's (CacheBlend, arXiv 2405.16444).

CacheBlend computes all rows of a reused text in the first layers, compares the last of these layers with the
stored rows, and continues with the tokens of the largest deviation ("high KV deviation" tokens). Tokens that
deviate at one layer mostly deviate at the next, so a single comparison serves all later layers.

The paper defines the deviation of keys and values. The authors' code (github.com/YaoJiayi/CacheBlend) uses
the squared difference of the values at layer index 1, LMCache (github.com/LMCache/LMCache) that of the keys.
The paper's gradual filtering, a share that falls from layer to layer, is not implemented in either code or
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from vlcache_fx.errors import PolicyError
from vlcache_fx.plan.budget import row_allowance
from vlcache_fx.policies.base import ProbedSpan, ProbingPolicy

Measure = Literal["value", "key", "key_value"]


@dataclass(frozen=True)
class CacheBlend(ProbingPolicy):
    """All rows in the first layers, then the budget's share of rows that deviate most from the donor's.

    The check layers come on top of the budget, as in the paper; the report's ``token_layer_fraction`` counts
    them: about 0.09 for 2 of 28 layers and a budget of 0.02. They also run twice, once as the probe (see
    ``ProbingPolicy``). Of rows with equal deviation, the earliest are chosen.

    Attributes:
        check_layers: number of first layers that compute keys and values of all rows, an integer >= 2. The
            deviation is measured in the last of them; in layer 0 it is zero. Default: 2.
        measure: tensor whose deviation counts: ``"value"`` as in the authors' code, ``"key"`` as in LMCache,
            or ``"key_value"`` for the sum of both. Default: ``"value"``.
    """

    name: ClassVar[str] = "cacheblend"
    ignores_budget: ClassVar[bool] = True

    check_layers: int = 2
    measure: Measure = "value"

    def __post_init__(self) -> None:
        count = self.check_layers
        if isinstance(count, bool) or not isinstance(count, int) or count < 2:
            raise PolicyError(f"cacheblend: check_layers must be an integer >= 2, not {count!r}")
        if self.measure not in get_args(Measure):
            valid = ", ".join(get_args(Measure))
            raise PolicyError(f"cacheblend: measure must be one of {valid}, not {self.measure!r}")

    @property
    def probe_layer(self) -> int:
        """Index of the last check layer."""
        return self.check_layers - 1

    def choose(self, span: ProbedSpan) -> Sequence[Tensor]:
        """See ``ProbingPolicy.choose``."""
        key, value = span.deviation.key, span.deviation.value
        distance = {"value": value, "key": key, "key_value": key + value}[self.measure]
        count = row_allowance(span.budget, span.length)
        all_rows = torch.arange(span.length)
        if count == span.length:
            return (all_rows,) * span.num_layers
        largest = torch.sort(distance, descending=True, stable=True).indices[:count].sort().values
        return tuple(all_rows if layer < self.check_layers else largest for layer in range(span.num_layers))
