"""Profiles from measured errors."""

import math
from collections.abc import Sequence

import pytest

from vlcache_fx.fidelity.calibrate import SHARES, UpTo, falling, sensitivities
from vlcache_fx.policies import Profile, SpanContext
from vlcache_fx.policies.layer_aware import LayerAware
from vlcache_fx.policies.uniform import Uniform

TRUE_SENSITIVITIES = (0.3, 0.25, 0.2, 0.1, 0.05, 0.05, 0.03, 0.02)
SPAN = 400


def error(counts: Sequence[int]) -> float:
    """Errors of a known profile: layers differ, and the worth of rows declines."""
    worth = [math.log1p(count) / math.log1p(SPAN) for count in counts]
    return 0.05 * (1 - sum(s * w for s, w in zip(TRUE_SENSITIVITIES, worth, strict=True)))


def span(layers: int, profile: Profile | None = None, budget: float = 1.0) -> SpanContext:
    return SpanContext(length=SPAN, num_layers=layers, profile=profile, budget=budget)


def measured(policy: UpTo) -> float:
    return error([len(rows) for rows in policy.select(span(len(TRUE_SENSITIVITIES)))])


def test_profile_beats_equal_counts() -> None:
    depths = range(len(TRUE_SENSITIVITIES) + 1)
    found = sensitivities(depths, [measured(UpTo(0.05, depth)) for depth in depths])
    assert found == pytest.approx(TRUE_SENSITIVITIES)
    curve = [(0.0, measured(UpTo(0.0))), *((share, measured(UpTo(share))) for share in SHARES), (1.0, 0.0)]
    profile = Profile("constructed", "float32", found, falling(curve))
    for budget in (0.01, 0.02, 0.05, 0.1):
        solved, equal = (
            error([len(rows) for rows in policy.select(span(len(found), profile, budget))])
            for policy in (LayerAware(), Uniform())
        )
        assert solved < equal


def test_sensitivities_of_noise_are_not_negative() -> None:
    assert sensitivities([0, 1, 2, 3], [1.0, 1.1, 0.4, 0.4]) == pytest.approx((0.0, 1.0, 0.0))
    assert sensitivities([0, 2, 4], [1.0, 0.5, 0.0]) == pytest.approx((0.25,) * 4)
    assert sensitivities([0, 1, 2], [1.0, 1.0, 1.0]) == (1.0, 1.0)
    shares, errors = zip(*falling([(0.0, 1.0), (0.5, 0.2), (0.7, 0.4), (1.0, 0.0)]), strict=True)
    assert shares == (0.0, 0.5, 0.7, 1.0)
    assert errors == pytest.approx((1.0, 0.3, 0.3, 0.0))
