"""``drop_empty_cats``: empty tensors, such as a new KV cache, are dropped from ``cat``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlcache_fx.passes.cleanup import DropEmptyCats

from ..programs import before_and_after, unchanged
from .graphs import program_of

X = torch.arange(6.0).reshape(1, 3, 2)


def append(x: Tensor) -> tuple[Tensor, ...]:
    empty = x.new_empty(0)
    return torch.cat([empty, x], -1), torch.cat([x, empty, x], 1), torch.cat([x, x], 1)


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("drop_empty_cats", before_and_after(DropEmptyCats(), program_of(append, X)))


def test_numbers() -> None:
    program = program_of(append, X)
    DropEmptyCats().run(program)
    program.graph_module.recompile()
    assert all(torch.equal(got, want) for got, want in zip(program.graph_module(X), append(X), strict=True))


def test_keeps_cats_of_values() -> None:
    assert unchanged(DropEmptyCats(), program_of(lambda x: (torch.cat([x, x * 2], 1),), X))


def test_keeps_converting_cat() -> None:
    def convert(x: Tensor) -> tuple[Tensor]:
        return (torch.cat([x.new_empty(0, dtype=torch.float64), x]),)

    program = program_of(convert, torch.ones(3))
    assert DropEmptyCats().run(program)
    program.graph_module.recompile()
    (want,) = convert(torch.ones(3))
    (got,) = program.graph_module(torch.ones(3))
    assert torch.equal(got.to(torch.float64), want)


def test_keeps_cat_of_empty_tensors() -> None:
    def nothing(x: Tensor) -> tuple[Tensor]:
        return (torch.cat([x.new_empty(0), x.new_empty(0)]),)

    assert unchanged(DropEmptyCats(), program_of(nothing, X))
