"""Metadata of a program's values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from vlcache_fx.lowering.values import TensorMeta, _Propagation, program_values
from vlcache_fx.passes import Program
from vlcache_fx.passes.standard import cold_program, warm_program
from vlcache_fx.testing.graphs import captured_graph
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

LAYERS = 3


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("rewrite", [cold_program, warm_program])
def test_program_values_repeated_layers(
    rewrite: Callable[..., Program], dynamic: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_vlm(num_layers=LAYERS, explicit_mask=True)
    captured, _ = captured_graph(model, tiny_vlm_inputs(3, 2, [(5, 0)]), dynamic=dynamic)
    program = rewrite(captured).graph_module
    asked: list[Node] = []
    ask = _Propagation._propagated

    def counted(self: _Propagation, node: Node, *arguments: object) -> object:
        asked.append(node)
        return ask(self, node, *arguments)

    monkeypatch.setattr(_Propagation, "_propagated", counted)
    values = program_values(program)
    linears = [node for node in asked if node.target is torch.ops.aten.linear.default]
    total = len(program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default))
    assert 0 < len(linears) < total / 2

    monkeypatch.setattr(_Propagation, "_call", ask)
    one_by_one = program_values(program)
    assert values.examples == one_by_one.examples
    assert values.by_node == one_by_one.by_node
    assert sum(isinstance(value, TensorMeta) for value in values.by_node.values()) > total


def test_program_values_sizes_from_data() -> None:
    def places(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.nonzero(), y.nonzero()

    program = make_fx(places, tracing_mode="symbolic", pre_dispatch=True)(torch.ones(7), torch.ones(7))
    values = program_values(program)
    (first, second) = (values[node] for node in program.graph.find_nodes(
        op="call_function", target=torch.ops.aten.nonzero.default
    ))  # fmt: skip
    assert first.sizes[0] != second.sizes[0]
    assert values.example(first.sizes[0]) is None
    assert first.sizes[1] == second.sizes[1] == 1


def test_program_values_invalid_programs() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output((x,))
    module = GraphModule(torch.nn.Module(), graph)
    with pytest.raises(ValueError, match=r"'x' has no meta\['val'\]"):
        program_values(module)
    x.meta["val"] = torch.ones(2)
    with graph.inserting_after(x):
        graph.call_method("relu", (x,))
    with pytest.raises(ValueError, match="'relu': a program has no call_method node"):
        program_values(module)
