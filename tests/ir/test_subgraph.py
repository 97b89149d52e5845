"""Parts of graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from vlcache_fx.ir.subgraph import extract, needed_for, on_cpu


class Both(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(3.0), requires_grad=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.factor, y + 1


def module() -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    traced = fx.symbolic_trace(Both())
    return traced, {node.name: node for node in traced.graph.nodes}


def flags(ids: Tensor) -> tuple[Tensor, Tensor]:
    """On the device of ``ids``: where they equal their position, and zeros."""
    positions = torch.arange(ids.shape[-1], device=ids.device)
    return (ids == positions).to(ids.device).unsqueeze(-1), ids.new_zeros(2)


def test_on_cpu_part_of_other_device() -> None:
    part: Any = make_fx(flags)(torch.empty(1, 4, dtype=torch.int64, device="meta"))
    before = str(part.graph)
    moved = on_cpu(part)
    assert moved is not None
    assert "meta" in before
    assert "meta" not in str(moved.graph)
    assert str(part.graph) == before
    ids = torch.tensor([[0, 7, 2, 3]])
    for got, want in zip(moved(ids), flags(ids), strict=True):
        assert torch.equal(got, want)


def test_on_cpu_constants_of_other_device() -> None:
    part = fx.symbolic_trace(Both())
    assert on_cpu(part) is not None
    assert on_cpu(part.to("meta")) is None


def test_needed_for() -> None:
    _, nodes = module()
    assert {node.name for node in needed_for([nodes["mul"]])} == {"mul", "x", "factor"}


def test_extract_inputs_and_results() -> None:
    traced, nodes = module()
    before = str(traced.graph)
    part = extract(traced, [nodes["mul"]])
    assert part(torch.tensor(2.0), None)[0].item() == 6
    assert "add" not in str(part.graph)
    assert [node.name for node in part.graph.nodes if node.op == "placeholder"] == ["x", "y"]
    assert str(traced.graph) == before


def test_extract_input_as_result() -> None:
    traced, nodes = module()
    x, y = extract(traced, [nodes["y"], nodes["x"]])(1, 2)
    assert (x, y) == (2, 1)
