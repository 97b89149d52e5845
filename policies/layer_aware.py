"""Spend the budget where a model's layers are sensitive to reuse error (VLCache, arXiv 2512.12977)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from vlcache_fx.errors import PolicyError
from vlcache_fx.plan.budget import token_layer_allowance
from vlcache_fx.policies.base import Policy, Profile

# Layers below this share of the most sensitive one count as insensitive: far below what can be measured, and
# it keeps the arithmetic away from the smallest numbers.
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class LayerAware(Policy):
    """More rows in sensitive layers, earliest tokens first; the default.

    Row sets can only shrink with depth (a skipped row has no hidden state further down), so sensitivities
    cannot be followed as they are: a sensitive late layer makes every layer before it compute as many rows.
    The counts follow the closest non-increasing curve in the least-squares sense (isotonic regression),
    scaled to the budget. A model whose late layers matter most thus gets a flat schedule, and one whose last
    layers do not matter drops them.

    Without a profile all layers count the same, and the choice equals ``uniform``.
    """

    name: ClassVar[str] = "layer_aware"

    def select(
        self, span_length: int, num_layers: int, profile: Profile | None, budget: float
    ) -> Sequence[Tensor]:
        """See ``Policy.select``.

        Raises:
            PolicyError: when the profile has another number of layers.
        """
        if profile is not None and len(profile.sensitivities) != num_layers:
            raise PolicyError(
                f"the profile has {len(profile.sensitivities)} layers, the model has {num_layers}"
            )
        largest = max(profile.sensitivities) if profile is not None else 0.0
        if profile is None or largest == 0:
            weights = [1.0] * num_layers
        else:
            ratios = [value / largest for value in profile.sensitivities]
            weights = non_increasing([ratio if ratio > _NEGLIGIBLE else 0.0 for ratio in ratios])
        allowance = token_layer_allowance(budget, span_length, num_layers)
        counts = _spend(weights, allowance, span_length)
        rows = {count: torch.arange(count) for count in set(counts)}
        return tuple(rows[count] for count in counts)


def non_increasing(values: Sequence[float]) -> list[float]:
    """The non-increasing sequence closest to ``values`` in squared error (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []  # (mean, size), means strictly falling
    for value in values:
        mean, size = value, 1
        while pools and pools[-1][0] <= mean:
            other, other_size = pools.pop()
            mean = (mean * size + other * other_size) / (size + other_size)
            size += other_size
        pools.append((mean, size))
    return [mean for mean, size in pools for _ in range(size)]


def _spend(weights: Sequence[float], allowance: int, span_length: int) -> list[int]:
    """Non-increasing row counts, one per layer, in proportion to non-increasing ``weights``.

    At most ``span_length`` each, at most ``allowance`` together.
    """
    # The first row goes through every layer that matters at all: one that stops half-way is worth little.
    matters = [int(weight > 0) for weight in weights]
    if allowance < sum(matters):
        return [0] * len(weights)
    shares = _fill(weights, allowance - sum(matters), span_length - 1)
    counts = [first + math.floor(share + 1e-9) for first, share in zip(matters, shares, strict=True)]
    left = allowance - sum(counts)
    # What rounding left over buys one more row for whole runs of equal layers, the first ones first.
    start = 0
    for weight, run in groupby(weights):
        end = start + len(list(run))
        room = span_length if start == 0 else counts[start - 1]
        if weight > 0 and end - start <= left and counts[start] < room:
            counts[start:end] = [counts[start] + 1] * (end - start)
            left -= end - start
        start = end
    return counts


def _fill(weights: Sequence[float], allowance: int, span_length: int) -> list[float]:
    """``weights`` scaled to sum to ``allowance``, where the first layers may fill up to ``span_length``."""
    full = 0
    while full < len(weights):
        rest = sum(weights[full:])
        scale = (allowance - full * span_length) / rest if rest > 0 else 0.0
        if scale * weights[full] <= span_length:
            return [float(span_length)] * full + [scale * weight for weight in weights[full:]]
        full += 1
    return [float(span_length)] * full
