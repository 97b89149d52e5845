"""The plain trace equals torch's export, and returns None for mutating graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.capture import dynamo
from vlcache_fx.testing.families import llava_inputs, tiny_llava
from vlcache_fx.testing.graphs import traced_graphs
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

IDLE = {"aten._assert_tensor_metadata.default", "aten.detach.default"}
PROMPT = tiny_vlm_inputs(3, 2, [(20, 0)])


def operators(module: torch.fx.GraphModule) -> list[str]:
    """The operators in order, without checks, dead nodes and ``detach`` of constants."""
    graph = module.graph
    graph.eliminate_dead_code()
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return [target for target in targets if target not in IDLE]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("model", "call"),
    [
        pytest.param(tiny_vlm(), PROMPT, id="causal"),
        pytest.param(tiny_vlm(explicit_mask=True), PROMPT, id="mask"),
        pytest.param(tiny_llava(2), llava_inputs(3, 4, [0]), id="llava", marks=pytest.mark.thorough),
    ],
)
def test_trace_without_writes_equals_export(
    model: nn.Module, call: dict[str, Tensor], dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct: list[list[str]] = []
    exported: list[list[str]] = []

    def both(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> None:
        direct.append(operators(dynamo.capture_dynamo(graph_module, example_inputs).graph_module))
        with monkeypatch.context() as patched:
            patched.setattr(dynamo, "trace_without_writes", lambda *_: None)
            exported.append(operators(dynamo.capture_dynamo(graph_module, example_inputs).graph_module))

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        traced_graphs(model, call, dynamic=dynamic, seen=both)
    assert any("scaled_dot_product_attention" in target for graph in direct for target in graph)
    assert direct == exported


class Writing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        doubled = x * 2
        doubled[:, 0] += 1
        return doubled.relu_()


def test_trace_without_writes_of_mutating_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[Any] = []
    trace = dynamo.trace_without_writes
    monkeypatch.setattr(
        dynamo, "trace_without_writes", lambda *args: traced.append(trace(*args)) or traced[-1]
    )
    (graph,) = traced_graphs(Writing(), {"x": torch.randn(3, 4)})
    captured = dynamo.capture_dynamo(graph.graph_module, graph.example_inputs)
    assert traced == [None]
    x = torch.randn(3, 4)
    assert torch.equal(captured.graph_module(x)[0], Writing()(x))
    assert not [name for name in operators(captured.graph_module) if name.endswith("_.default")]
