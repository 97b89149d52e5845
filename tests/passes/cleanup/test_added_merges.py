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
MASK = torch.tensor([[False, True, True, False], [True, False, False, True]])


def noise(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


INPUTS = (noise(0, 2, 4, 3), MASK, noise(1, 4, 3))

Build = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def added(x: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    elements = mask.unsqueeze(-1).expand_as(x)
    return (x.masked_scatter(elements, x[elements] + features.reshape(-1)) * 2,)


def added_the_other_way(x: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    elements = mask.unsqueeze(-1).expand_as(x)
    return (x.masked_scatter(elements, features.reshape(-1) + x[elements]),)


def read_elsewhere(x: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    elements = mask.unsqueeze(-1).expand_as(x)
    return (x.masked_scatter(elements, x[~elements] + features.reshape(-1)),)


def read_from_another(x: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    elements = mask.unsqueeze(-1).expand_as(x)
    return (x.masked_scatter(elements, (x + 1)[elements] + features.reshape(-1)),)


def multiplied(x: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    elements = mask.unsqueeze(-1).expand_as(x)
    return (x.masked_scatter(elements, x[elements] * features.reshape(-1)),)


def replaced(x: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    return (x.masked_scatter(mask.unsqueeze(-1), features),)


@pytest.mark.parametrize("build", [added, added_the_other_way])
def test_numbers(build: Build) -> None:
    program = program_of(build, *INPUTS)
    assert AddedMerges().run(program)
    program.graph.lint()
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    assert not program.graph.find_nodes(op="call_function", target=aten.index.Tensor)
    got, want = program.graph_module(*INPUTS)[0], build(*INPUTS)[0]
    assert torch.equal(got, want)
    assert not AddedMerges().run(program)


@pytest.mark.parametrize("build", [read_elsewhere, read_from_another, multiplied, replaced])
def test_keeps_other_writes(build: Build) -> None:
    assert unchanged(AddedMerges(), program_of(build, *INPUTS))
