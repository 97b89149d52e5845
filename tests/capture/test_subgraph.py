"""Parts of graphs."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from vlcache_fx.capture.subgraph import extract, needed_for


class Both(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(3.0), requires_grad=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.factor, y + 1


def module() -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    traced = fx.symbolic_trace(Both())
    return traced, {node.name: node for node in traced.graph.nodes}


def test_needed_for() -> None:
    _, nodes = module()
    assert {node.name for node in needed_for([nodes["mul"]])} == {"mul", "x", "factor"}


def test_extract_has_all_inputs_and_the_results_asked_for() -> None:
    traced, nodes = module()
    before = str(traced.graph)
    part = extract(traced, [nodes["mul"]])
    assert part(torch.tensor(2.0), None)[0].item() == 6
    assert "add" not in str(part.graph)
    assert [node.name for node in part.graph.nodes if node.op == "placeholder"] == ["x", "y"]
    assert str(traced.graph) == before


def test_an_input_can_be_a_result() -> None:
    traced, nodes = module()
    x, y = extract(traced, [nodes["y"], nodes["x"]])(1, 2)
    assert (x, y) == (2, 1)
