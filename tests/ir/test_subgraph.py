"""Parts of graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from vlcache_fx.ir.subgraph import computation_digest, extract, needed_for, on_cpu


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
    """Whatever device it stands for: of token ids, where they count from 0, and none of them."""
    places = torch.arange(ids.shape[-1], device=ids.device)
    return (ids == places).to(ids.device).unsqueeze(-1), ids.new_zeros(2)


def test_a_part_of_another_device_runs_on_the_cpu() -> None:
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


def test_a_part_with_constants_elsewhere_stays_there() -> None:
    part = fx.symbolic_trace(Both())
    assert on_cpu(part) is not None
    assert on_cpu(part.to("meta")) is None


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


# What a result is computed by ------------------------------------------------------------------------------


def digest(function: Callable[..., Any], result: int | None = None, **names: str) -> str:
    """Of a function's result (or of one of several), with names for its parameters."""
    traced = fx.symbolic_trace(function)
    value: Any = traced.graph.output_node().args[0]
    placeholders = traced.graph.find_nodes(op="placeholder")
    given = {node: names.get(str(node.target), str(node.target)) for node in placeholders}
    return computation_digest(traced, value if result is None else value[result], given)


def plain(x: Tensor, y: Tensor) -> Any:
    return torch.cat([x * 2.0, y.exp()], dim=1)


def among_others(y: Tensor, z: Tensor, x: Tensor) -> Any:
    noise = z.sin()
    first = x * 2.0
    other = noise + first
    second = y.exp()
    return other, torch.cat([first, second], dim=1), noise


def test_equal_computations_have_one_digest() -> None:
    want = digest(plain)
    assert digest(among_others, 1) == want
    assert digest(lambda a, b: torch.cat([a * 2.0, b.exp()], dim=1), a="x", b="y") == want


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: torch.cat([y * 2.0, x.exp()], dim=1),
        lambda x, y: torch.cat([y.exp(), x * 2.0], dim=1),
        lambda x, y: torch.cat([x * 2.5, y.exp()], dim=1),
        lambda x, y: torch.cat([x * 2.0, y.exp()], dim=0),
        lambda x, y: torch.cat([x * 2.0, y.exp2()], dim=1),
        lambda x, y: torch.cat([x * 2.0, x.exp()], dim=1),
        lambda x, y: torch.cat([x * 2.0, y.exp(), y], dim=1),
        lambda x, y: torch.cat([x * 2.0, y.exp()], dim=1) + 0,
    ],
    ids=["inputs", "order", "number", "keyword", "operator", "one input", "one more", "behind it"],
)  # fmt: skip
def test_other_computations_have_others(function: Callable[..., Any]) -> None:
    assert digest(function) != digest(plain)


def test_inputs_are_known_by_the_names_given() -> None:
    assert digest(plain, x="y", y="x") != digest(plain)
    assert digest(lambda x: x) != digest(lambda y: y)
    assert digest(lambda x: x) == digest(lambda y: y, y="x")


def holding(value: Any) -> torch.nn.Module:
    class Holding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Module()
            self.inner.register_buffer("held", value)

        def forward(self, x: Tensor) -> Any:
            return x + self.inner.held

    return Holding()


def test_constants_count_by_content() -> None:
    ones = digest(holding(torch.ones(2)))
    assert digest(holding(torch.ones(2))) == ones
    assert digest(holding(torch.ones(2) * 2)) != ones
    assert digest(holding(torch.ones(2, dtype=torch.float64))) != ones
