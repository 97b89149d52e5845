"""How many of a span's earliest rows every layer recomputes, when layers differ in what that is worth.

With sensitivities s_l (what recomputing in layer l is worth, of L layers) and a concave gain W(n) (what the
earliest n rows are worth in a layer), the counts n_l solve

    maximise    s_0 W(n_0) + s_1 W(n_1) + ... + s_{L-1} W(n_{L-1})
    subject to  n_0 >= n_1 >= ... >= n_{L-1} >= 0,   n_0 + n_1 + ... + n_{L-1} <= allowance.

The order is forced: a row that was skipped in a layer has no hidden state in the next. Where a later layer is
more sensitive than an earlier layer, the constraint binds and both have equal counts; which layers those are
does not depend on W, and pooling adjacent violators finds them (isotonic regression of s). Between the pools
the constraint is slack, and rows are bought by falling gain per token-layer, which is optimal for concave W
up to the last purchase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Curve = Sequence[tuple[float, float]]
"""Share of a span's rows, the earliest, that all layers recompute -> error left. Shares rise from 0 to 1."""

# Layers below this share of the most sensitive one count as insensitive: far below what can be measured, and
# it keeps the arithmetic away from the smallest numbers.
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Gain:
    """A concave, piecewise linear gain: rows ``ends[p - 1]`` to ``ends[p]`` are worth ``slopes[p]`` each."""

    ends: tuple[int, ...]
    slopes: tuple[float, ...]

    @classmethod
    def of_curve(cls, curve: Curve, span_length: int) -> Gain:
        """The gain of a measured error curve: what its lower convex hull falls, for a span of this length.

        Empty where the curve does not fall.
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
        """The gain to assume when none was measured: about the logarithm of the number of rows.

        Counts are then about proportional to sensitivities.
        """
        ends, slopes = [1], [1.0]
        while ends[-1] < span_length:
            ends.append(min(2 * ends[-1], span_length))
            slopes.append(slopes[-1] / 2)
        return cls(tuple(ends), tuple(slopes))

    def __call__(self, rows: int) -> float:
        """W(rows)."""
        total, start = 0.0, 0
        for end, slope in zip(self.ends, self.slopes, strict=True):
            total += slope * max(0, min(rows, end) - start)
            start = end
        return total


def allocate(sensitivities: Sequence[float], gain: Gain, allowance: int, span_length: int) -> list[int]:
    """Non-increasing row counts, one per layer: at most ``span_length`` each, ``allowance`` together.

    The better, by the objective above, of the greedy solution and of equal counts; with all sensitivities
    equal (or zero) equal counts.
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
    """The objective's value of ``counts``."""
    known = {count: gain(count) for count in set(counts)}
    return sum(value * known[count] for value, count in zip(sensitivities, counts, strict=True))


def pools(values: Sequence[float]) -> list[tuple[float, int]]:
    """Neighbouring layers that must have equal counts, as (mean, layers), means strictly falling.

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
        # Rows are bought in order: a segment is for sale once the segment before is bought in full.
        if counts[pool] == starts[segment]:
            size = pooled[pool][1]
            bought = max(0, min(gain.ends[segment], above, counts[pool] + allowance // size) - counts[pool])
            counts[pool] += bought
            allowance -= bought * size
    return [count for count, (_, size) in zip(counts, pooled, strict=True) for _ in range(size)]


def convex_hull(curve: Curve) -> list[tuple[float, float]]:
    """The lower convex hull of a curve: noise can make a measured error rise, or fall too fast too late."""
    hull: list[tuple[float, float]] = []
    for x, y in curve:
        while len(hull) >= 2 and _turns_right(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def _turns_right(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - b[0]) >= (c[1] - b[1]) * (b[0] - a[0])
