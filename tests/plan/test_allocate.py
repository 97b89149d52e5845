"""Row counts per layer, against brute force and against equal counts."""

import itertools
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlcache_fx.plan.allocate import Gain, allocate, convex_hull, pools, worth

values = st.lists(st.floats(0, 100), min_size=1, max_size=4)
slopes = st.lists(st.floats(0.01, 1), min_size=1, max_size=4)


def every_choice(layers: int, rows: int, allowance: int) -> Iterator[tuple[int, ...]]:
    for counts in itertools.product(range(rows + 1), repeat=layers):
        if sum(counts) <= allowance and all(a >= b for a, b in pairwise(counts)):
            yield counts


@given(values, slopes, st.integers(0, 16))
def test_allocate_is_optimal_up_to_the_last_purchase(
    sensitivities: list[float], falling: list[float], allowance: int
) -> None:
    span = len(falling)
    gain = Gain(tuple(range(1, span + 1)), tuple(sorted(falling, reverse=True)))
    counts = allocate(sensitivities, gain, allowance, span)
    assert sum(counts) <= allowance
    assert all(span >= a >= b >= 0 for a, b in pairwise((span, *counts)))
    best = max(worth(sensitivities, gain, other) for other in every_choice(len(counts), span, allowance))
    # What the relaxed problem could still gain is less than one row through one pool of layers.
    step = max(mean * size for mean, size in pools(sensitivities)) * gain.slopes[0]
    assert worth(sensitivities, gain, counts) >= best - step - 1e-6
    if allowance >= span * len(counts) and min(sensitivities) > 0.01:
        assert counts == [span] * len(counts)


def test_allocate_beats_equal_counts() -> None:
    gain = Gain.of_length(400)
    sensitivities = [5.0, 4.0, 3.0, 1.0, 0.2, 0.1]
    counts = allocate(sensitivities, gain, 48, 400)
    assert sum(counts) <= 48
    assert worth(sensitivities, gain, counts) > 1.1 * worth(sensitivities, gain, [8] * 6)


@given(values, st.integers(1, 300), st.floats(0, 1))
def test_allocate_is_never_worse_than_equal_counts(
    sensitivities: list[float], span: int, budget: float
) -> None:
    layers = len(sensitivities)
    allowance = int(budget * span * layers)
    gain = Gain.of_length(span)
    counts = allocate(sensitivities, gain, allowance, span)
    largest = max(sensitivities)
    equal = worth(sensitivities, gain, [allowance // layers] * layers)
    assert worth(sensitivities, gain, counts) >= equal - 1e-5 * (1 + largest)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_pools_are_the_isotonic_regression(sensitivities: list[float]) -> None:
    fitted = [mean for mean, size in pools(sensitivities) for _ in range(size)]
    assert len(fitted) == len(sensitivities)
    assert all(a >= b for a, b in pairwise(fitted))
    # A projection on a convex cone: the residual is orthogonal to the fit, and at most 0 against any member.
    residual = [value - fit for value, fit in zip(sensitivities, fitted, strict=True)]
    tolerance = 1e-6 * (1 + sum(value * value for value in sensitivities))
    assert abs(sum(r * f for r, f in zip(residual, fitted, strict=True))) <= tolerance
    for end in range(1, len(sensitivities) + 1):  # the cone is spanned by steps: ones, then zeros
        assert sum(residual[:end]) <= tolerance
    assert abs(sum(residual)) <= tolerance


def test_gain_of_curve() -> None:
    gain = Gain.of_curve([(0.0, 1.0), (0.1, 0.5), (1.0, 0.0)], 100)
    assert [gain(rows) for rows in (0, 5, 10, 100)] == pytest.approx([0, 0.25, 0.5, 1.0])
    assert Gain.of_curve([(0.0, 1.0), (1.0, 1.0)], 100).ends == ()


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_convex_hull_is_convex_and_below_the_curve(errors: list[float]) -> None:
    shares = [index / (len(errors) - 1) for index in range(len(errors))]
    curve = list(zip(shares, errors, strict=True))
    hull = convex_hull(curve)
    steps: Sequence[float] = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(hull)]
    assert all(a <= b + 1e-9 for a, b in pairwise(steps))
    below = np.interp(shares, *zip(*hull, strict=True))
    assert all(low <= error + 1e-9 for low, error in zip(below, errors, strict=True))
