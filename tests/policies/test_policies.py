"""Every registered policy makes executable choices within the budget; each does what its name says."""

from collections.abc import Sequence

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
from vlcache_fx.policies.layer_aware import LayerAware
from vlcache_fx.policies.none import NoRows
from vlcache_fx.policies.uniform import Uniform

NAMES = sorted(known_policies())
sensitivities = st.lists(st.floats(0, 100), min_size=1, max_size=12)
budgets = st.floats(0, 1)
lengths = st.integers(1, 300)


def counts(chosen: Sequence[Tensor]) -> list[int]:
    return [len(rows) for rows in chosen]


def profile(values: Sequence[float]) -> Profile:
    return Profile("weights", "float32", tuple(values), ((0.0, 0.1), (0.1, 0.01), (1.0, 0.0)))


@pytest.mark.parametrize("name", NAMES)
@given(values=sensitivities, with_profile=st.booleans(), budget=budgets, length=lengths)
def test_choices_are_executable_and_affordable(
    name: str, values: list[float], with_profile: bool, budget: float, length: int
) -> None:
    policy = get_policy(name)
    layers, needed = len(values), name == "auto"
    chosen = policy.select(length, layers, profile(values) if needed or with_profile else None, budget)
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
