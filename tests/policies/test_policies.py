"""The contract of every registered policy, and the rule of each."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.errors import PolicyError
from vlcache_fx.plan import row_allowance
from vlcache_fx.policies import (
    Deviation,
    Policy,
    ProbedSpan,
    Profile,
    SpanContext,
    get_policy,
    known_policies,
)
from vlcache_fx.policies.auto import Auto
from vlcache_fx.policies.cacheblend import CacheBlend
from vlcache_fx.policies.first_k import FirstK
from vlcache_fx.policies.full import Full
from vlcache_fx.policies.layer_aware import LayerAware
from vlcache_fx.policies.none import NoRows
from vlcache_fx.policies.random import Random
from vlcache_fx.policies.uniform import Uniform
from vlcache_fx.testing.policy_contract import check_policy

sensitivities = st.lists(st.floats(0, 100), min_size=1, max_size=12)
budgets = st.floats(0, 1)
lengths = st.integers(1, 300)


def span(length: int, layers: int, profile: Profile | None, budget: float) -> SpanContext:
    return SpanContext(length=length, num_layers=layers, profile=profile, budget=budget)


def probed(deviation: Deviation, layers: int, budget: float) -> ProbedSpan:
    length = len(deviation.key)
    return ProbedSpan(length=length, num_layers=layers, budget=budget, deviation=deviation)


def counts(chosen: Sequence[Tensor]) -> list[int]:
    return [len(rows) for rows in chosen]


def profile(values: Sequence[float]) -> Profile:
    return Profile("weights", "float32", tuple(values), ((0.0, 0.1), (0.1, 0.01), (1.0, 0.0)))


@pytest.mark.parametrize(
    "policy",
    [
        *map(get_policy, sorted(known_policies())),
        Random(seed=7),
        CacheBlend(check_layers=4, measure="key_value"),
    ],
    ids=str,
)
def test_check_policy_registered_policies(policy: Policy) -> None:
    assert check_policy(policy, profiles=[profile([3, 1, 0, 2, 2])]) == []


def test_first_k_ignores_budget_in_select() -> None:
    """The plan cuts the rows, so the report lists the repair."""
    with pytest.raises(AssertionError, match="token-layers, the budget allows"):
        check_policy(FirstK(tokens=32))


@pytest.mark.parametrize(
    "policy", [Full(), NoRows(), FirstK(), FirstK(tokens=5), Uniform(), LayerAware(), Auto()]
)
@given(values=sensitivities, budget=budgets, length=lengths)
def test_select_earliest_rows(policy: Policy, values: list[float], budget: float, length: int) -> None:
    for rows in policy.select(span(length, len(values), profile(values), budget)):
        assert torch.equal(rows, torch.arange(len(rows)))


def test_select_full_and_none() -> None:
    assert counts(Full().select(span(50, 3, None, 0.0))) == [50] * 3
    assert counts(NoRows().select(span(50, 3, None, 1.0))) == [0] * 3


@given(budget=budgets, length=lengths, layers=st.integers(1, 30))
def test_uniform_spends_budget_evenly(budget: float, length: int, layers: int) -> None:
    assert (
        counts(Uniform().select(span(length, layers, None, budget)))
        == [row_allowance(budget, length)] * layers
    )


def test_first_k() -> None:
    assert counts(FirstK(tokens=32).select(span(100, 2, None, 0.01))) == [32, 32]
    assert counts(FirstK(tokens=32).select(span(10, 2, None, 0.01))) == [10, 10]
    assert counts(FirstK(share=0.2).select(span(100, 2, None, 0.01))) == [20, 20]
    assert counts(FirstK().select(span(100, 2, None, 0.05))) == [5, 5]


@pytest.mark.parametrize(
    "arguments", [{"tokens": 1, "share": 0.1}, {"tokens": -1}, {"share": 1.1}, {"share": -0.1}]
)
def test_first_k_checks_its_parameters(arguments: dict[str, float]) -> None:
    with pytest.raises(PolicyError, match="first_k"):
        FirstK(**arguments)  # type: ignore[arg-type]


def test_random_follows_seed_and_budget() -> None:
    few, many, other = (
        Random(seed).select(span(200, 3, None, budget))[0].tolist()
        for seed, budget in [(0, 0.05), (0, 0.1), (1, 0.05)]
    )
    assert (len(few), len(many), len(other)) == (10, 20, 10)
    assert set(few) < set(many)
    assert few != other
    assert few != list(range(10))


def test_random_is_uniform_over_rows() -> None:
    """Each of 20 rows is drawn for a quarter of 400 seeds: 100 times, within five standard deviations."""
    drawn = torch.cat([Random(seed).select(span(20, 1, None, 0.25))[0] for seed in range(400)])
    counted = torch.bincount(drawn, minlength=20)
    assert counted.sum() == 400 * 5
    assert (counted - 100).abs().max() < 5 * (400 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("seed", [-1, 2**63, True, 0.5, "0"])
def test_random_checks_its_seed(seed: Any) -> None:
    with pytest.raises(PolicyError, match="random: seed"):
        Random(seed)


@pytest.mark.parametrize(("measure", "expected"), [("value", [1, 4]), ("key", [0, 2]), ("key_value", [0, 4])])
def test_cacheblend_selects_largest_deviation(measure: Any, expected: list[int]) -> None:
    deviation = Deviation(1, torch.tensor([9.0, 0, 5, 1, 4]), torch.tensor([1.0, 5, 0, 3, 8]))
    chosen = CacheBlend(measure=measure).choose(probed(deviation, 4, 0.4))
    assert [rows.tolist() for rows in chosen] == [[0, 1, 2, 3, 4]] * 2 + [expected] * 2


def test_cacheblend_ties_select_earliest() -> None:
    chosen = CacheBlend().choose(probed(Deviation(1, *torch.ones(2, 50)), 3, 0.1))
    assert chosen[2].tolist() == [0, 1, 2, 3, 4]


def test_cacheblend_probe_layer() -> None:
    policy = CacheBlend(check_layers=3)
    assert policy.probe_layer == 2
    assert counts(policy.select(span(7, 5, None, 0.0))) == [7, 7, 7, 0, 0]


@pytest.mark.parametrize(
    "arguments", [{"check_layers": 1}, {"check_layers": 2.0}, {"check_layers": True}, {"measure": "query"}]
)
def test_cacheblend_checks_its_parameters(arguments: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=f"cacheblend: {next(iter(arguments))}"):
        CacheBlend(**arguments)
