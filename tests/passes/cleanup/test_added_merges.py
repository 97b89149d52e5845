"""``added_merges``: features that are added to the placeholders' embeddings become a merge."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlcache_fx.passes.cleanup import AddedMerges

from ..programs import unchanged
from .graphs import program_of

aten = torch.ops.aten
IDS = torch.tensor([[1, 5, 5, 2], [5, 0, 3, 5]])


def noise(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


INPUTS = (IDS, noise(0, 7, 3), noise(1, 4, 3))

Build = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def _embedded(ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.nn.functional.embedding(ids, weight)
    return x, (ids == 5).unsqueeze(-1).expand(2, 4, 3)


def added(ids: Tensor, weight: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    x, mask = _embedded(ids, weight)
    return (x.masked_scatter(mask, x[mask] + features.reshape(-1)) * 2,)


def added_the_other_way(ids: Tensor, weight: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    x, mask = _embedded(ids, weight)
    return (x.masked_scatter(mask, features.reshape(-1) + x[mask]),)


def read_elsewhere(ids: Tensor, weight: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    x, mask = _embedded(ids, weight)
    return (x.masked_scatter(mask, x[~mask] + features.reshape(-1)),)


def read_from_another(ids: Tensor, weight: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    x, mask = _embedded(ids, weight)
    return (x.masked_scatter(mask, (x + 1)[mask] + features.reshape(-1)),)


def multiplied(ids: Tensor, weight: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    x, mask = _embedded(ids, weight)
    return (x.masked_scatter(mask, x[mask] * features.reshape(-1)),)


def replaced(ids: Tensor, weight: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    x, mask = _embedded(ids, weight)
    return (x.masked_scatter(mask, features),)


def of_several_tokens(ids: Tensor, weight: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    x = torch.nn.functional.embedding(ids, weight)
    mask = (ids >= 3).unsqueeze(-1).expand(2, 4, 3)
    return (x.masked_scatter(mask, x[mask] + torch.cat([features, features]).reshape(-1)[:15]),)


def of_other_tokens(ids: Tensor, weight: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    x = torch.nn.functional.embedding(ids - 1, weight.repeat(2, 1))
    mask = (ids == 5).unsqueeze(-1).expand(2, 4, 3)
    return (x.masked_scatter(mask, x[mask] + features.reshape(-1)),)


@pytest.mark.parametrize("build", [added, added_the_other_way])
def test_numbers(build: Build) -> None:
    program = program_of(build, *INPUTS)
    assert AddedMerges().run(program)
    program.graph.lint()
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    assert not program.graph.find_nodes(op="call_function", target=aten.index.Tensor)
    (merge,) = program.graph.find_nodes(op="call_function", target=aten.masked_scatter.default)
    got, want = program.graph_module(*INPUTS)[0], build(*INPUTS)[0]
    assert torch.equal(got, want)
    assert merge.meta["val"].shape == want.shape
    assert not AddedMerges().run(program)


@pytest.mark.parametrize(
    "build",
    [read_elsewhere, read_from_another, multiplied, replaced, of_several_tokens, of_other_tokens],
)
def test_keeps_other_writes(build: Build) -> None:
    assert unchanged(AddedMerges(), program_of(build, *INPUTS))
