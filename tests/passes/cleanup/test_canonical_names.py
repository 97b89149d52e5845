"""``canonical_names``: operators with several names get one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vlcache_fx.passes.cleanup import CanonicalNames
from vlcache_fx.passes.cleanup.canonical_names import NAMES

from ..programs import before_and_after, unchanged
from .graphs import program_of

aten = torch.ops.aten
X, Y = (torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


def several(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Use two names of the same operators."""
    return (
        torch.multiply(x, y) * x,
        torch.subtract(x, y, alpha=2),
        torch.concat([x, y], dim=1),
        torch.divide(x, y, rounding_mode="floor"),
        x.clip(min=0.5),
    )


def usual(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return x * y, x - y, torch.cat([x, y])


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("canonical_names", before_and_after(CanonicalNames(), program_of(several, X, Y)))


def test_numbers() -> None:
    program = program_of(several, X, Y)
    assert CanonicalNames().run(program)
    program.graph_module.recompile()
    assert not any(name in str(program.graph.nodes) for name in ("multiply", "subtract", "concat", "clip"))
    for got, want in zip(program.graph_module(X, Y), several(X, Y), strict=True):
        assert torch.equal(got, want)


def test_keeps_usual_names() -> None:
    assert unchanged(CanonicalNames(), program_of(usual, X, Y))


def described(argument: torch.Argument) -> tuple[str, str, bool]:
    return argument.name, str(argument.type), argument.kwarg_only


@pytest.mark.parametrize(("other", "name"), NAMES.items())
def test_signatures_are_equal(other: str, name: str) -> None:
    for overload in getattr(aten, other).overloads():
        first, second = (getattr(getattr(aten, each), overload)._schema.arguments for each in (other, name))
        assert [described(one) for one in first] == [described(one) for one in second]
