"""``layer_aware``: uniform without a profile, and row counts that follow a profile."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.errors import PolicyError
from vlcache_fx.policies import Profile, SpanContext
from vlcache_fx.policies.layer_aware import LayerAware
from vlcache_fx.policies.uniform import Uniform


def span(length: int, layers: int, profile: Profile | None, budget: float) -> SpanContext:
    return SpanContext(length=length, num_layers=layers, profile=profile, budget=budget)


def counts(chosen: Sequence[Tensor]) -> list[int]:
    return [len(rows) for rows in chosen]


def profile(values: Sequence[float], curve: tuple[tuple[float, float], ...] = ()) -> Profile:
    return Profile("weights", "float32", tuple(values), curve)


@given(budget=st.floats(0, 1), length=st.integers(1, 300), layers=st.integers(1, 30))
def test_layer_aware_without_or_with_flat_profile_is_uniform(budget: float, length: int, layers: int) -> None:
    expected = counts(Uniform().select(span(length, layers, None, budget)))
    assert counts(LayerAware().select(span(length, layers, None, budget))) == expected
    assert counts(LayerAware().select(span(length, layers, profile([3.0] * layers), budget))) == expected


def test_layer_aware_drops_insensitive_layers() -> None:
    # 40 token-layers, all of them in sensitive layers.
    assert counts(LayerAware().select(span(100, 4, profile([1, 1, 0, 0]), 0.1))) == [20, 20, 0, 0]


def test_layer_aware_flat_for_sensitive_late_layers() -> None:
    assert counts(LayerAware().select(span(100, 4, profile([0, 0, 1, 2]), 0.1))) == [10] * 4


def test_layer_aware_follows_falling_sensitivities() -> None:
    chosen = counts(LayerAware().select(span(1000, 4, profile([8, 4, 2, 1]), 0.1)))
    assert sum(chosen) <= 400
    assert chosen[0] > chosen[1] > chosen[2] > chosen[3] > 0


def test_layer_aware_with_error_curve() -> None:
    # The error is constant after a tenth of the rows, so the rest goes to less sensitive layers.
    curve = ((0.0, 1.0), (0.1, 0.0), (1.0, 0.0))
    assert counts(LayerAware().select(span(100, 2, profile([9, 1], curve), 0.1))) == [10, 10]
    assert counts(LayerAware().select(span(100, 2, profile([9, 1], curve), 0.05))) == [10, 0]
    flat = ((0.0, 1.0), (1.0, 1.0))
    assert counts(LayerAware().select(span(100, 2, profile([1, 1], flat), 0.1))) == [10, 10]


def test_layer_aware_budget_one_selects_all_rows() -> None:
    assert counts(LayerAware().select(span(10, 3, profile([8, 1, 1]), 1.0))) == [10, 10, 10]


def test_layer_aware_zero_sensitivities_is_uniform() -> None:
    assert counts(LayerAware().select(span(100, 2, profile([0, 0]), 0.1))) == [10, 10]


def test_layer_aware_rejects_profile_of_other_model() -> None:
    with pytest.raises(PolicyError, match="the profile has 2 layers, the model has 3"):
        LayerAware().select(span(100, 3, profile([1, 2]), 0.1))
