"""``merge_sums``: features added where embeddings are zero become a merge."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlcache_fx.passes.cleanup import MergeSums

from ..programs import before_and_after, unchanged
from .graphs import program_of

aten, scatter_rows = torch.ops.aten, torch.ops.vlcache.scatter_rows
MASK = torch.tensor([[False, True, True, False], [True, False, False, True]])


def noise(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


INPUTS = (noise(0, 2, 4, 3), MASK, noise(1, 4, 3), ~MASK)

Build = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def added(x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """Write an addition as ``DenseDeepstack`` does."""
    return torch.where(mask.unsqueeze(-1), x + scatter_rows(features, mask), x)


def cleared(x: Tensor, mask: Tensor, features: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return (added(x.masked_fill(mask.unsqueeze(-1), 0.0) * 12.0, mask, features),)


def cleared_and_cast(x: Tensor, mask: Tensor, features: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return (added(x.masked_fill(mask.unsqueeze(-1), 0).double() * 3, mask, features.double()),)


def never_cleared(x: Tensor, mask: Tensor, features: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return (added(x * 12.0, mask, features),)


def filled_with_ones(x: Tensor, mask: Tensor, features: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return (added(x.masked_fill(mask.unsqueeze(-1), 1.0), mask, features),)


def cleared_elsewhere(x: Tensor, mask: Tensor, features: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    return (added(x.masked_fill(other.unsqueeze(-1), 0.0), mask, features),)


def moved_after(x: Tensor, mask: Tensor, features: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return (added(x.masked_fill(mask.unsqueeze(-1), 0.0) + 1.0, mask, features),)


def multiplied_by_infinity(x: Tensor, mask: Tensor, features: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return (added(x.masked_fill(mask.unsqueeze(-1), 0.0) * float("inf"), mask, features),)


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("merge_sums", before_and_after(MergeSums(), program_of(cleared, *INPUTS)))


@pytest.mark.parametrize("build", [cleared, cleared_and_cast])
def test_numbers(build: Build) -> None:
    program = program_of(build, *INPUTS)
    assert MergeSums().run(program)
    program.graph.lint()
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    (merge,) = program.graph.find_nodes(op="call_function", target=aten.masked_scatter.default)
    got, want = program.graph_module(*INPUTS)[0], build(*INPUTS)[0]
    assert torch.equal(got, want)
    assert merge.meta["val"].shape == want.shape


@pytest.mark.parametrize(
    "build", [never_cleared, filled_with_ones, cleared_elsewhere, moved_after, multiplied_by_infinity]
)
def test_keeps_other_additions(build: Build) -> None:
    assert unchanged(MergeSums(), program_of(build, *INPUTS))
