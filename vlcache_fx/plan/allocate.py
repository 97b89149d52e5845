"""Allocation of a row budget to layers of different sensitivity.

Each layer recomputes a span's earliest rows. With sensitivities s_l (the value of recomputing in layer l, of
L layers) and a concave gain W(n) (the value of the earliest n rows in a layer), the row counts n_l solve

    maximise    s_0 W(n_0) + s_1 W(n_1) + ... + s_{L-1} W(n_{L-1})
    subject to  n_0 >= n_1 >= ... >= n_{L-1} >= 0,   n_0 + n_1 + ... + n_{L-1} <= allowance.

Counts must not increase, because a row skipped in one layer has no hidden state in the next. Where a later
layer is more sensitive than an earlier one, the constraint binds and both have equal counts. These pools of
layers do not depend on W; pooling adjacent violators finds them (isotonic regression of s). Between pools the
constraint is slack, and rows are bought in order of decreasing gain per token-layer, which is optimal for
concave W up to the last purchase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Curve = Sequence[tuple[float, float]]
"""Points (share of a span's earliest rows that all layers recompute, remaining error), shares from 0 to 1."""

# Sensitivities below this share of the largest count as zero: far below what can be measured, and denormal
# numbers are avoided.
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Gain:
    """A concave, piecewise linear gain: rows ``ends[p - 1]`` to ``ends[p]`` add ``slopes[p]`` each."""

    ends: tuple[int, ...]
    slopes: tuple[float, ...]

    @classmethod
    def of_curve(cls, curve: Curve, span_length: int) -> Gain:
        """Return the decrease of a measured error curve's lower convex hull, for a span of this length.

        Segments without a decrease are left out; a curve that never falls has a gain of zero.
        """
        hull = convex_hull(curve)
        ends: list[int] = []
        slopes: list[float] = []
        for (start, before), (end, after) in pairwise(hull):
            last = round(end * span_length)
            if last > (ends[-1] if ends else 0) and before > after:
                ends.append(last)
                slopes.append((before - after) / ((end - start) * span_length))
        return cls(tuple(ends), tuple(slopes))

    @classmethod
    def of_length(cls, span_length: int) -> Gain:
        """Return the default gain without a measurement: about the logarithm of the number of rows.

        It makes counts about proportional to sensitivities.
        """
        ends, slopes = [1], [1.0]
        while ends[-1] < span_length:
            ends.append(min(2 * ends[-1], span_length))
            slopes.append(slopes[-1] / 2)
        return cls(tuple(ends), tuple(slopes))

    def __call__(self, rows: int) -> float:
        """Return W(rows)."""
        total, start = 0.0, 0
        for end, slope in zip(self.ends, self.slopes, strict=True):
            total += slope * max(0, min(rows, end) - start)
            start = end
        return total


def allocate(sensitivities: Sequence[float], gain: Gain, allowance: int, span_length: int) -> list[int]:
    """Return non-increasing row counts per layer, each up to ``span_length``, in total up to ``allowance``.

    Chooses the better of the greedy solution and equal counts, by the objective above. Equal sensitivities
    give equal counts.
    """
    layers = len(sensitivities)
    equal = [min(span_length, allowance // layers)] * layers
    largest = max(sensitivities)
    if largest <= 0:
        return equal
    ratios = [value / largest for value in sensitivities]
    scaled = [ratio if ratio > _NEGLIGIBLE else 0.0 for ratio in ratios]
    solved = _greedy(pools(scaled), gain, allowance, span_length)
    return max(equal, solved, key=lambda counts: (worth(scaled, gain, counts), -sum(counts)))


def worth(sensitivities: Sequence[float], gain: Gain, counts: Sequence[int]) -> float:
    """Return the objective for ``counts``."""
    gains = {count: gain(count) for count in set(counts)}
    return sum(value * gains[count] for value, count in zip(sensitivities, counts, strict=True))


def pools(values: Sequence[float]) -> list[tuple[float, int]]:
    """Return pools of neighbouring layers with equal counts as (mean, number of layers); means strictly fall.

    Pool adjacent violators: the non-increasing sequence closest to ``values`` in squared error.
    """
    pooled: list[tuple[float, int]] = []
    for value in values:
        mean, size = value, 1
        while pooled and pooled[-1][0] <= mean:
            other, other_size = pooled.pop()
            mean = (mean * size + other * other_size) / (size + other_size)
            size += other_size
        pooled.append((mean, size))
    return pooled


def _greedy(pooled: Sequence[tuple[float, int]], gain: Gain, allowance: int, span_length: int) -> list[int]:
    counts = [0] * len(pooled)
    starts = (0, *gain.ends)
    offers = sorted(
        (-slope * mean, segment, pool)
        for pool, (mean, _) in enumerate(pooled)
        for segment, slope in enumerate(gain.slopes)
        if mean * slope > 0
    )
    for _, segment, pool in offers:
        above = counts[pool - 1] if pool else span_length
        # Rows are bought in order: a segment requires all rows of the segments before it.
        if counts[pool] == starts[segment]:
            size = pooled[pool][1]
            bought = max(0, min(gain.ends[segment], above, counts[pool] + allowance // size) - counts[pool])
            counts[pool] += bought
            allowance -= bought * size
    return [count for count, (_, size) in zip(counts, pooled, strict=True) for _ in range(size)]


def convex_hull(curve: Curve) -> list[tuple[float, float]]:
    """Return the lower convex hull of a curve, which removes measurement noise that breaks concavity."""
    hull: list[tuple[float, float]] = []
    for x, y in curve:
        while len(hull) >= 2 and _turns_right(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def _turns_right(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - b[0]) >= (c[1] - b[1]) * (b[0] - a[0])
