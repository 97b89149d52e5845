"""``written_merges``: features that are written by index become a merge."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlcache_fx.passes import Program
from vlcache_fx.passes.cleanup import WrittenMerges

from ..programs import unchanged
from .graphs import program_of

aten = torch.ops.aten
MASK = torch.tensor([[False, True, True, False], [True, False, False, True]])


def noise(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


INPUTS = (noise(0, 2, 4, 3), MASK, noise(1, 4, 3))

Build = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def written(x: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    return (aten.index_put(x * 2, [mask], features) + 1,)


def one_row_for_all(x: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    return (aten.index_put(x, [mask], features[:1]),)


def accumulated(x: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    return (aten.index_put(x, [mask], features, True),)


def by_number(x: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    return (aten.index_put(x[0], [mask.long().argmax(1)], features[:2]),)


def of_columns(x: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, ...]:
    return (aten.index_put(x.transpose(1, 2), [None, None, mask[0]], features[:, :2].reshape(2, -1)[:, :1]),)


def test_numbers() -> None:
    program = program_of(written, *INPUTS)
    assert WrittenMerges().run(program)
    program.graph.lint()
    program.graph_module.recompile()
    (merge,) = program.graph.find_nodes(op="call_function", target=aten.masked_scatter.default)
    got, want = program.graph_module(*INPUTS)[0], written(*INPUTS)[0]
    assert torch.equal(got, want)
    assert merge.meta["val"].shape == want.shape
    assert not WrittenMerges().run(program)


def test_width_that_the_trace_does_not_know() -> None:
    width = torch.export.Dim.DYNAMIC

    class Writes(torch.nn.Module):
        def forward(self, x: Tensor, mask: Tensor, features: Tensor) -> Tensor:
            return aten.index_put(x, [mask], features)

    shapes = {"x": None, "mask": None, "features": {0: width, 1: width}}
    exported = torch.export.export(Writes(), INPUTS, dynamic_shapes=shapes)
    program = Program(exported.graph_module)
    assert WrittenMerges().run(program)
    assert program.graph.find_nodes(op="call_function", target=aten.masked_scatter.default)


@pytest.mark.parametrize("build", [one_row_for_all, accumulated, by_number, of_columns])
def test_keeps_other_writes(build: Build) -> None:
    assert unchanged(WrittenMerges(), program_of(build, *INPUTS))
