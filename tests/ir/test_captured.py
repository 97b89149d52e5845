"""Methods of ``Captured``."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from vlcache_fx.ir import Captured, InputKind


def captured(specialised: tuple[tuple[int, float | int | bool], ...] = ()) -> Captured:
    class Sum(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor]:
            return (x + y,)

    return Captured(fx.symbolic_trace(Sum()), (InputKind.DATA, InputKind.WEIGHT), specialised)


def test_placeholders_order() -> None:
    assert [node.name for node in captured().placeholders] == ["x", "y"]


def test_inputs_of_kind() -> None:
    graph = captured()
    assert graph.indices_of(InputKind.WEIGHT) == (1,)
    assert [node.name for node in graph.inputs_of(InputKind.WEIGHT)] == ["y"]
    assert graph.indices_of(InputKind.SIZE) == ()


def test_holds_for_folded_numbers() -> None:
    folded = captured(((1, 0.5),))
    assert folded.holds_for((torch.ones(2), torch.tensor(0.5, dtype=torch.float64)))
    assert folded.holds_for([torch.ones(2), 0.5])
    assert not folded.holds_for((torch.ones(2), torch.tensor(0.25)))
    assert captured().holds_for((torch.ones(2), torch.tensor(0.25)))
