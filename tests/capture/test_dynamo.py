"""Dynamo's graphs as the IR."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlcache_fx.capture import capture_dynamo
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.testing.families import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen2_5_vl
from vlcache_fx.testing.graphs import TracedGraph, captured_graph, traced_graphs
from vlcache_fx.testing.tiny_vlm import tiny_vlm, tiny_vlm_inputs

CALL, OTHER = tiny_vlm_inputs(3, 2, [(5, 0)]), tiny_vlm_inputs(4, 5, [(6, 1)], text_seed=3)


def capture(graph: TracedGraph) -> Captured:
    return capture_dynamo(graph.graph_module, graph.example_inputs)


def targets(captured: Captured) -> list[str]:
    return [str(node.target) for node in captured.graph_module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("dynamic", [False, None, True])
@pytest.mark.parametrize("explicit_mask", [False, True])
def test_capture_dynamo_values_and_operators(dynamic: bool | None, explicit_mask: bool) -> None:
    model = tiny_vlm(explicit_mask=explicit_mask)
    (graph,) = traced_graphs(model, CALL, dynamic=dynamic)
    captured = capture(graph)
    with torch.no_grad():
        assert torch.equal(captured.graph_module(*graph.calls[0])[0], model(**CALL))
    assert targets(captured).count("aten.scaled_dot_product_attention.default") == 2
    assert not [
        target for target in targets(captured) if not target.startswith(("aten.", "<built-in", "<function"))
    ]
    assert len(captured.kinds) == len(captured.placeholders) == len(graph.example_inputs)
    assert all("val" in node.meta for node in captured.graph_module.graph.nodes if node.op == "call_function")


def test_capture_dynamo_dynamic_lengths() -> None:
    model = tiny_vlm()
    (graph,) = traced_graphs(model, CALL, OTHER, dynamic=True)
    captured = capture(graph)
    with torch.no_grad():
        for args, call in zip(graph.calls, (CALL, OTHER), strict=True):
            assert torch.equal(captured.graph_module(*args)[0], model(**call))
    assert InputKind.SIZE in captured.kinds


def test_capture_dynamo_static_then_symbolic() -> None:
    """A static graph, then a symbolic one: two independent captures."""
    model = tiny_vlm()
    static, dynamic = traced_graphs(model, CALL, OTHER)
    first, second = capture(static), capture(dynamic)
    assert InputKind.SIZE not in first.kinds
    assert InputKind.SIZE in second.kinds
    with torch.no_grad():
        assert torch.equal(first.graph_module(*static.calls[0])[0], model(**CALL))
        assert torch.equal(second.graph_module(*dynamic.calls[0])[0], model(**OTHER))


def test_capture_dynamo_folds_module_floats() -> None:
    (graph,) = traced_graphs(tiny_vlm(), CALL, dynamic=True)
    captured = capture(graph)
    assert 1e-6 in [value for _, value in captured.specialised]  # the norms' eps
    args = list(graph.calls[0])
    assert captured.holds_for(args)
    index, value = captured.specialised[-1]
    args[index] = torch.tensor(2 * value, dtype=torch.float64)
    assert not captured.holds_for(args)
    assert not any("item" in target or "local_scalar" in target for target in targets(captured))
    (graph,) = traced_graphs(tiny_vlm(), CALL, dynamic=False)
    assert capture(graph).specialised == ()


class Lookup(nn.Module):
    """A parameter, two buffers, and tensors and a number of the request."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("table", torch.randn(9, 4))
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        x = (x @ self.weight + self.table[positions]) * self.scale
        return x if mask is None else x * mask


def test_capture_dynamo_kinds_by_source() -> None:
    call = {"x": torch.randn(6, 4), "positions": torch.arange(6), "mask": torch.ones(6, 1)}
    captured, graph = captured_graph(Lookup(), call, dynamic=True)
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for kind, value in zip(captured.kinds, graph.calls[0], strict=True):
        shapes.setdefault(kind.value, []).append(tuple(value.shape) if isinstance(value, Tensor) else ())
    assert sorted(shapes["weight"]) == [(4,), (4, 4), (9, 4)]
    assert sorted(shapes["data"]) == [(6,), (6, 1), (6, 4)]
    assert shapes["size"] == [()]


def test_capture_dynamo_writes_to_own_tensors() -> None:
    class Inplace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y[1:] += 1
            return y.relu_()

    (graph,) = traced_graphs(Inplace(), {"x": torch.ones(3)})
    captured = capture(graph)
    assert captured.graph_module(torch.ones(3))[0].tolist() == [2, 3, 3]
    assert not [target for target in targets(captured) if target.endswith("_.default")]


def test_capture_dynamo_refuses_untraceable() -> None:
    class DataDependent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.nonzero()[: int(x.sum())]

    graph = torch.fx.symbolic_trace(nn.Identity())

    def broken(x: Any) -> Any:
        raise ValueError("cannot be\ntraced")

    node = next(iter(graph.graph.nodes))
    with graph.graph.inserting_after(node):
        call = graph.graph.call_function(broken, (node,))
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    graph.recompile()
    with pytest.raises(UnsupportedGraphError, match="ValueError: cannot be") as refusal:
        capture_dynamo(graph, [torch.ones(2)])
    assert refusal.value.reason is Reason.CAPTURE_FAILED


def test_capture_dynamo_repeated() -> None:
    """The backend may be called twice for one frame."""
    model = tiny_vlm(num_layers=1)
    (graph,) = traced_graphs(model, CALL, dynamic=True)
    before = str(graph.graph_module.graph)
    first, second = capture(graph), capture(graph)
    assert str(graph.graph_module.graph) == before
    assert str(first.graph_module.graph) == str(second.graph_module.graph)
    assert first.specialised == second.specialised
    assert not set(first.graph_module.graph.nodes) & set(second.graph_module.graph.nodes)
    first.graph_module.graph.erase_node(next(iter(reversed(first.graph_module.graph.nodes))))
    first.graph_module.graph.output(())
    first.graph_module.recompile()
    with torch.no_grad():
        assert torch.equal(second.graph_module(*graph.calls[0])[0], model(**CALL))
        assert torch.equal(graph.graph_module(*graph.calls[0])[0], model(**CALL))


def test_capture_dynamo_in_backend() -> None:
    """In Dynamo's own compilation context, and again after a reset."""
    model = tiny_vlm(num_layers=1)
    captured: list[Captured] = []

    def backend(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        captured.append(capture_dynamo(graph_module, example_inputs))
        return captured[-1].graph_module

    for _ in range(2):
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(model, backend=backend, dynamic=True)
            assert torch.equal(compiled(**CALL), model(**CALL))
            assert torch.equal(compiled(**OTHER), model(**OTHER))
    assert len(captured) == 2  # capture added no guards: both lengths use one graph
    assert str(captured[0].graph_module.graph) == str(captured[1].graph_module.graph)


def test_capture_dynamo_source_lines() -> None:
    (graph,) = traced_graphs(tiny_vlm(), CALL)
    captured = capture(graph)
    lines = [
        n.meta.get("stack_trace") or "" for n in captured.graph_module.graph.nodes if "attention" in n.name
    ]
    assert lines
    assert all("tiny_vlm.py" in line for line in lines)


@pytest.mark.parametrize(
    ("make", "call"),
    [(tiny_qwen2_5_vl, qwen_inputs(6, 3, [])), (tiny_llava, llava_inputs(6, 3, []))],
    ids=["qwen2_5_vl", "llava"],
)
def test_capture_dynamo_transformers_decoders(make: Any, call: dict[str, Tensor]) -> None:
    graphs = traced_graphs(make(num_layers=1), {**call, "use_cache": False})
    assert graphs
    for graph in graphs:
        captured = capture(graph)
        with torch.no_grad():
            got, want = captured.graph_module(*graph.calls[0]), graph.graph_module(*graph.calls[0])
        for left, right in zip(got, want, strict=True):
            torch.testing.assert_close(left, right)
