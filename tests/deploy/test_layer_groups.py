"""Which layers compute the same rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from vlcache_fx.deploy.layer_groups import PROBED_LENGTHS, layer_groups
from vlcache_fx.errors import PolicyError
from vlcache_fx.policies import Policy, Profile, SpanContext, get_policy

LAYERS = 6


def profile(*sensitivities: float) -> Profile:
    return Profile("a model", "float32", sensitivities)


@dataclass(frozen=True)
class Chosen(Policy):
    """Chooses what a test says, of a span's length."""

    name: ClassVar[str] = "chosen"

    choice: Callable[[int], Sequence[Tensor]]

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        return self.choice(span.length)


@pytest.mark.parametrize("name", ["layer_aware", "uniform", "first_k", "full", "none", "random"])
def test_without_a_profile_all_layers_are_one_group(name: str) -> None:
    assert layer_groups(get_policy(name), LAYERS, None, 0.02) == (LAYERS,)


def test_a_profile_in_which_late_layers_do_not_matter_makes_groups() -> None:
    groups = layer_groups(get_policy("layer_aware"), LAYERS, profile(8, 4, 2, 1, 0, 0), 0.1)
    assert len(groups) > 1
    assert sum(groups) == LAYERS
    assert min(groups) >= 1
    assert groups[-1] >= 2


def test_a_profile_of_equal_layers_makes_one_group() -> None:
    assert layer_groups(get_policy("layer_aware"), LAYERS, profile(*[2.0] * LAYERS), 0.1) == (LAYERS,)


def test_each_layer_of_cacheblend_is_a_group() -> None:
    assert layer_groups(get_policy("cacheblend"), LAYERS, None, 0.02) == (1,) * LAYERS


def test_layers_are_one_group_only_where_they_have_the_same_rows_at_every_length() -> None:
    def choice(length: int) -> list[Tensor]:
        few, many = torch.arange(1), torch.arange(length)
        return [many, many if length == PROBED_LENGTHS[-1] else few, few.clone()]

    assert layer_groups(Chosen(choice), 3, None, 0.02) == (1, 1, 1)
    assert layer_groups(
        Chosen(lambda length: [torch.arange(2), torch.arange(1), torch.arange(1)]), 3, None, 0.02
    ) == (1, 2)


def test_a_profile_of_another_number_of_layers_is_refused() -> None:
    with pytest.raises(PolicyError, match="2 layers, the model has 6"):
        layer_groups(get_policy("layer_aware"), LAYERS, profile(1, 2), 0.02)
