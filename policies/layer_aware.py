"""Recompute the earliest tokens, more of them in layers that are sensitive (VLCache, arXiv 2512.12977)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlcache_fx.errors import PolicyError
from vlcache_fx.plan.allocate import Gain, allocate
from vlcache_fx.plan.budget import token_layer_allowance
from vlcache_fx.policies.base import Policy, SpanContext
from vlcache_fx.policies.profile import Profile


@dataclass(frozen=True)
class LayerAware(Policy):
    """More rows in sensitive layers, earliest tokens first; the default.

    Row sets can only shrink with depth (a skipped row has no hidden state further down), so sensitivities
    are not followed directly: a sensitive late layer makes every layer before it compute as many rows.
    ``vlcache_fx.plan.allocate`` states the objective under that rule, and its solution. A model whose late
    layers matter most thus gets a flat schedule, and a model whose last layers do not matter drops them.

    Without a profile all layers count the same, and the choice equals ``uniform``.
    """

    name: ClassVar[str] = "layer_aware"

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """See ``Policy.select``.

        Raises:
            PolicyError: when the profile has another number of layers.
        """
        allowance = token_layer_allowance(span.budget, span.length, span.num_layers)
        return earliest(row_counts(span.length, span.num_layers, span.profile, allowance))


def row_counts(span_length: int, num_layers: int, profile: Profile | None, allowance: int) -> list[int]:
    """Rows per layer that ``allowance`` token-layers buy.

    Raises:
        PolicyError: when the profile has another number of layers.
    """
    if profile is None:
        return allocate([1.0] * num_layers, Gain.of_length(span_length), allowance, span_length)
    if len(profile.sensitivities) != num_layers:
        raise PolicyError(f"the profile has {len(profile.sensitivities)} layers, the model has {num_layers}")
    measured = Gain.of_curve(profile.error_curve, span_length)
    gain = measured if measured.ends else Gain.of_length(span_length)
    return allocate(profile.sensitivities, gain, allowance, span_length)


def earliest(counts: Sequence[int]) -> tuple[Tensor, ...]:
    """The first rows of a span, so many per layer."""
    rows = {count: torch.arange(count) for count in set(counts)}
    return tuple(rows[count] for count in counts)
