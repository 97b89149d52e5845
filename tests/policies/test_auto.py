"""``auto``: the fewest rows under an error bound."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.errors import PolicyError
from vlcache_fx.policies import Profile, SpanContext
from vlcache_fx.policies.auto import Auto, predicted_error
from vlcache_fx.policies.layer_aware import row_counts

CURVE = ((0.0, 0.04), (0.02, 0.02), (0.1, 0.01), (1.0, 0.0))


def span(length: int, layers: int, profile: Profile | None, budget: float) -> SpanContext:
    return SpanContext(length=length, num_layers=layers, profile=profile, budget=budget)


def counts(chosen: Sequence[Tensor]) -> list[int]:
    return [len(rows) for rows in chosen]


def profile(values: Sequence[float]) -> Profile:
    return Profile("weights", "float32", tuple(values), CURVE)


@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=6),
    st.floats(0, 0.05),
    st.sampled_from([50, 400, 1000]),
)
def test_auto_smallest_budget_under_bound(values: list[float], bound: float, length: int) -> None:
    model = profile(values)
    chosen = counts(Auto(bound).select(span(length, len(values), model, 0.5)))
    total = sum(chosen)
    assert predicted_error(chosen, model, length) <= bound + 1e-9
    if total:
        fewer = row_counts(length, len(values), model, total - 1)
        assert predicted_error(fewer, model, length) > bound - 1e-9


def test_predicted_error_at_points_of_curve() -> None:
    assert counts(Auto(0.02).select(span(1000, 3, profile([1, 1, 1]), 0.0))) == [20] * 3
    assert counts(Auto(0.05).select(span(1000, 3, profile([1, 1, 1]), 0.0))) == [0] * 3
    assert counts(Auto(0.0).select(span(1000, 3, profile([1, 1, 1]), 0.0))) == [1000] * 3


def test_auto_knows_how_many_contexts_a_donor_has() -> None:
    better = tuple((share, error / 4) for share, error in CURVE)
    model = Profile("weights", "float32", (1.0,), CURVE, ((4, better),), 16)
    own = span(1000, 1, model, 0.0)
    chosen = [counts(Auto(0.015).select(replace(own, contexts=number))) for number in (1, 3, 4, 9)]
    assert chosen == [[60], [60], [0], [0]]


@pytest.mark.parametrize("model", [None, Profile("weights", "float32", (1.0,))])
def test_auto_requires_error_curve(model: Profile | None) -> None:
    with pytest.raises(PolicyError, match="auto needs a profile with an error curve"):
        Auto().select(span(100, 1, model, 0.02))


@pytest.mark.parametrize("bound", [-1, float("nan"), float("inf"), "0.1", True])
def test_auto_bad_max_error(bound: object) -> None:
    with pytest.raises(PolicyError, match="max_error must be a number >= 0"):
        Auto(bound)  # type: ignore[arg-type]
