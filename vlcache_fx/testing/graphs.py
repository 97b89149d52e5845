"""The graphs that ``torch.compile`` makes of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlcache_fx.capture import capture_dynamo
from vlcache_fx.ir import Captured
from vlcache_fx.passes import Program
from vlcache_fx.passes.standard import CLEANUP


@dataclass(frozen=True)
class TracedGraph:
    """What Dynamo calls a backend with, and the arguments of every call of the compiled result."""

    graph_module: torch.fx.GraphModule
    example_inputs: list[Any]
    calls: list[tuple[Any, ...]]


def traced_graphs(
    model: nn.Module,
    *calls: Mapping[str, Any],
    dynamic: bool | None = None,
    seen: Callable[[torch.fx.GraphModule, list[Any]], object] | None = None,
) -> list[TracedGraph]:
    """The graphs that ``torch.compile`` makes of ``model``, called with each of ``calls`` in order.

    Args:
        model: to be traced; nothing in it is changed.
        calls: keyword arguments.
        dynamic: as for ``torch.compile``.
        seen: called as a backend is, while Dynamo still knows where each input comes from.
    """
    graphs: list[TracedGraph] = []

    def record(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graph = TracedGraph(graph_module, list(example_inputs), [])
        graphs.append(graph)
        if seen is not None:
            seen(graph_module, example_inputs)

        def run(*args: Any) -> Any:
            graph.calls.append(args)
            return graph_module(*args)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=record, dynamic=dynamic)
    with torch.no_grad():
        for call in calls:
            compiled(**call)
    return graphs


def captured_graph(
    model: nn.Module, *calls: Mapping[str, Any], dynamic: bool | None = None
) -> tuple[Captured, TracedGraph]:
    """The one graph of ``model`` for all ``calls``, captured and cleaned up as the backend does it."""
    captures: list[Captured] = []
    graphs = traced_graphs(
        model, *calls, dynamic=dynamic, seen=lambda *given: captures.append(capture_dynamo(*given))
    )
    (captured,), (graph,) = captures, graphs
    CLEANUP.run(Program(captured.graph_module))
    return captured, graph
