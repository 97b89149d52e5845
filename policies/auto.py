"""Recompute the smallest number of earliest tokens whose predicted error is under a bound.

The rows are those of ``layer_aware`` (VLCache, arXiv 2512.12977).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlcache_fx.errors import PolicyError
from vlcache_fx.plan.allocate import Gain, convex_hull, worth
from vlcache_fx.policies.base import Policy, SpanContext
from vlcache_fx.policies.layer_aware import earliest, row_counts
from vlcache_fx.policies.profile import Profile


@dataclass(frozen=True)
class Auto(Policy):
    """The fewest rows with a predicted error under a bound, whatever the budget.

    The predicted error is the error without any rows minus the worth of the rows of each layer
    (``vlcache_fx.plan.allocate``), both from the model's profile, for donors of as many contexts as the
    span's has. It is a mean over the prompts of the profile's measurement, not a bound for a single request.

    Attributes:
        max_error: bound of the mean KL divergence of the next token from full recompute, in nats, a number
            >= 0. Default: 0.01.
    """

    name: ClassVar[str] = "auto"
    ignores_budget: ClassVar[bool] = True

    max_error: float = 0.01

    def __post_init__(self) -> None:
        value = self.max_error
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise PolicyError(f"auto: max_error must be a number >= 0 (nats), not {value!r}")

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """See ``Policy.select``.

        Raises:
            PolicyError: there is no profile with an error curve, or the profile is for another model.
        """
        if span.profile is None or not span.profile.error_curve:
            raise PolicyError(
                "auto needs a profile with an error curve: write one with vlcache calibrate, "
                "and set the option profile to its path"
            )
        counts = _counts(span.length, span.num_layers, span.profile, span.contexts, float(self.max_error))
        return earliest(counts)


@functools.lru_cache(maxsize=256)
def _counts(
    span_length: int, num_layers: int, profile: Profile, contexts: int, max_error: float
) -> list[int]:
    """Bisect the number of token-layers: the predicted error never rises with it."""
    profile = profile.for_contexts(contexts)
    few, many = 0, span_length * num_layers
    while few < many:
        middle = (few + many) // 2
        counts = row_counts(span_length, num_layers, profile, middle)
        if predicted_error(counts, profile, span_length) <= max_error:
            many = middle
        else:
            few = middle + 1
    return row_counts(span_length, num_layers, profile, many)


def predicted_error(counts: Sequence[int], profile: Profile, span_length: int) -> float:
    """Return the error that the profile predicts for row counts per layer, in nats.

    It is the error without any rows minus the worth of the rows, weighted by the layers' sensitivities.
    """
    hull = convex_hull(profile.error_curve)
    sensitivities = profile.sensitivities if any(profile.sensitivities) else [1.0] * len(counts)
    gain = Gain.of_curve(profile.error_curve, span_length)
    return hull[0][1] - worth(sensitivities, gain, counts) / sum(sensitivities)
