"""Divergence, agreement, and their intervals."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlcache_fx.fidelity.compare import average, compare, proportion


def test_compare_equal_logits() -> None:
    scores = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    answers = [scores[0].argmax(-1), torch.tensor([9])]
    first, second = compare(scores, scores, answers)
    assert (first.kl, first.agrees, first.right) == (0.0, True, True)
    assert (second.kl, second.agrees, second.right) == (0.0, True, False)


def test_compare_known_divergence() -> None:
    exact = torch.log(torch.tensor([[[0.5, 0.5], [0.75, 0.25]]]))
    reused = torch.log(torch.tensor([[[0.9, 0.1], [0.25, 0.75]]]))
    (last,) = compare(exact, reused, [torch.tensor([0])])  # the answer is the last position
    assert last.kl == pytest.approx(0.75 * math.log(3) - 0.25 * math.log(3))
    assert (last.agrees, last.right) == (False, False)
    (both,) = compare(exact, reused, [torch.tensor([0, 1])])
    first = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert both.kl == pytest.approx((first + last.kl) / 2)
    assert both.right
    assert not both.agrees


def test_proportion_wilson_interval() -> None:
    half = proportion([True] * 5 + [False] * 5)
    assert (half.mean, half.low, half.high) == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)
    sure = proportion([True] * 10)
    assert (sure.mean, sure.high) == pytest.approx((1.0, 1.0))
    assert sure.low == pytest.approx(0.7225, abs=1e-4)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20))
def test_average_within_its_interval(values: list[float]) -> None:
    interval = average(values)
    assert 0 <= interval.low <= interval.mean + 1e-12
    assert interval.mean <= interval.high
