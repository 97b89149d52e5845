"""Recompute the earliest tokens, more of them in sensitive layers (VLCache, arXiv 2512.12977)."""

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
from vlcache_fx.policies.uniform import Uniform


@dataclass(frozen=True)
class LayerAware(Policy):
    """More rows in sensitive layers, earliest tokens first; the default.

    Row sets can only shrink with depth (a skipped row has no hidden state in later layers), so row counts
    cannot follow sensitivities directly: a sensitive late layer needs as many rows in every layer before it.
    ``vlcache_fx.plan.allocate`` has the objective under this constraint, and its solution. Models with
    sensitive late layers get equal counts; insensitive last layers get no rows.

    Without a profile, the choice is that of ``uniform``.
    """

    name: ClassVar[str] = "layer_aware"

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """See ``Policy.select``.

        Raises:
            PolicyError: the profile has another number of layers.
        """
        if span.profile is None:
            return Uniform().select(span)
        allowance = token_layer_allowance(span.budget, span.length, span.num_layers)
        return earliest(row_counts(span.length, span.num_layers, span.profile, allowance))


def row_counts(span_length: int, num_layers: int, profile: Profile, allowance: int) -> list[int]:
    """Distribute ``allowance`` token-layers: return the number of rows per layer.

    Raises:
        PolicyError: the profile has another number of layers.
    """
    if len(profile.sensitivities) != num_layers:
        raise PolicyError(f"the profile has {len(profile.sensitivities)} layers, the model has {num_layers}")
    measured = Gain.of_curve(profile.error_curve, span_length)
    gain = measured if measured.ends else Gain.of_length(span_length)
    return allocate(profile.sensitivities, gain, allowance, span_length)


def earliest(counts: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the first ``counts[i]`` rows of a span for each layer i."""
    rows = {count: torch.arange(count) for count in set(counts)}
    return tuple(rows[count] for count in counts)
