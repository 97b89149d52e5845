"""Every registered policy makes executable choices within the budget; each does what its name says."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.errors import PolicyError
from vlcache_fx.plan import row_allowance, token_layer_allowance
from vlcache_fx.policies import Policy, Profile, get_policy, known_policies
from vlcache_fx.policies.first_k import FirstK
from vlcache_fx.policies.full import Full
from vlcache_fx.policies.layer_aware import LayerAware, non_increasing
from vlcache_fx.policies.none import NoRows
from vlcache_fx.policies.uniform import Uniform

NAMES = sorted(known_policies())
sensitivities = st.lists(st.floats(0, 100), min_size=1, max_size=12)
budgets = st.floats(0, 1)
lengths = st.integers(1, 300)


def counts(chosen: Sequence[Tensor]) -> list[int]:
    return [len(rows) for rows in chosen]


def profile(values: Sequence[float]) -> Profile:
    return Profile("weights", "float32", tuple(values))


@pytest.mark.parametrize("name", NAMES)
@given(values=sensitivities, with_profile=st.booleans(), budget=budgets, length=lengths)
def test_choices_are_executable_and_affordable(
    name: str, values: list[float], with_profile: bool, budget: float, length: int
) -> None:
    policy = get_policy(name)
    layers = len(values)
    chosen = policy.select(length, layers, profile(values) if with_profile else None, budget)
    assert len(chosen) == layers
    for rows in chosen:
        assert rows.dtype == torch.int64
        assert torch.equal(rows, torch.arange(len(rows)))  # the earliest ones, which makes them nested
        assert len(rows) <= length
    assert counts(chosen) == sorted(counts(chosen), reverse=True)
    if not policy.ignores_budget:
        assert sum(counts(chosen)) <= token_layer_allowance(budget, length, layers)


def test_full_and_none() -> None:
    assert counts(Full().select(50, 3, None, 0.0)) == [50] * 3
    assert counts(NoRows().select(50, 3, None, 1.0)) == [0] * 3


@pytest.mark.parametrize("policy", [Full(), NoRows(), FirstK(), Uniform(), LayerAware()])
def test_equal_layers_are_one_tensor(policy: Policy) -> None:
    assert len({id(rows) for rows in policy.select(100, 28, None, 0.1)}) == 1


@given(budget=budgets, length=lengths, layers=st.integers(1, 30))
def test_uniform_spends_the_budget_evenly(budget: float, length: int, layers: int) -> None:
    assert counts(Uniform().select(length, layers, None, budget)) == [row_allowance(budget, length)] * layers


@given(budget=budgets, length=lengths, layers=st.integers(1, 30))
def test_layer_aware_without_a_profile_is_uniform(budget: float, length: int, layers: int) -> None:
    flat = profile([3.0] * layers)
    expected = counts(Uniform().select(length, layers, None, budget))
    assert counts(LayerAware().select(length, layers, None, budget)) == expected
    assert counts(LayerAware().select(length, layers, flat, budget)) == expected


def test_first_k() -> None:
    assert counts(FirstK(tokens=32).select(100, 2, None, 0.01)) == [32, 32]
    assert counts(FirstK(tokens=32).select(10, 2, None, 0.01)) == [10, 10]
    assert counts(FirstK(share=0.2).select(100, 2, None, 0.01)) == [20, 20]
    assert counts(FirstK().select(100, 2, None, 0.05)) == [5, 5]


@pytest.mark.parametrize(
    "arguments", [{"tokens": 1, "share": 0.1}, {"tokens": -1}, {"share": 1.1}, {"share": -0.1}]
)
def test_first_k_checks_its_parameters(arguments: dict[str, float]) -> None:
    with pytest.raises(PolicyError, match="first_k"):
        FirstK(**arguments)  # type: ignore[arg-type]


def test_layer_aware_drops_layers_that_do_not_matter() -> None:
    # 40 token-layers: all of them where it matters.
    assert counts(LayerAware().select(100, 4, profile([1, 1, 0, 0]), 0.1)) == [20, 20, 0, 0]


def test_layer_aware_is_flat_when_the_late_layers_matter_most() -> None:
    assert counts(LayerAware().select(100, 4, profile([0, 0, 1, 2]), 0.1)) == [10] * 4


def test_layer_aware_follows_falling_sensitivities() -> None:
    chosen = counts(LayerAware().select(1000, 4, profile([4, 3, 2, 1]), 0.1))
    assert sum(chosen) <= 400
    assert chosen == pytest.approx([160, 120, 80, 40], abs=2)


def test_layer_aware_fills_up_at_the_span() -> None:
    assert counts(LayerAware().select(10, 3, profile([8, 1, 1]), 0.6)) == [10, 4, 4]
    assert counts(LayerAware().select(10, 3, profile([8, 1, 1]), 1.0)) == [10, 10, 10]


def test_layer_aware_takes_the_first_row_through_all_layers_that_matter() -> None:
    assert counts(LayerAware().select(16, 4, profile([9, 1, 1, 1]), 0.02)) == [1] * 4


def test_layer_aware_with_nothing_sensitive_is_uniform() -> None:
    assert counts(LayerAware().select(100, 2, profile([0, 0]), 0.1)) == [10, 10]


def test_layer_aware_refuses_another_models_profile() -> None:
    with pytest.raises(PolicyError, match="the profile has 2 layers, the model has 3"):
        LayerAware().select(100, 3, profile([1, 2]), 0.1)


@given(sensitivities)
def test_non_increasing_is_the_closest(values: list[float]) -> None:
    fitted = non_increasing(values)
    assert len(fitted) == len(values)
    assert all(a >= b for a, b in pairwise(fitted))
    # A projection on a convex cone: the residual is orthogonal to the fit, and at most 0 against any member.
    residual = [value - fit for value, fit in zip(values, fitted, strict=True)]
    tolerance = 1e-6 * (1 + sum(value * value for value in values))
    assert abs(sum(r * f for r, f in zip(residual, fitted, strict=True))) <= tolerance
    for end in range(1, len(values) + 1):  # the cone is spanned by steps: ones, then zeros
        assert sum(residual[:end]) <= tolerance
    assert abs(sum(residual)) <= tolerance
