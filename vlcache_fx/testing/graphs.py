"""Traces the graphs of ``torch.compile`` for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlcache_fx.capture import capture_dynamo
from vlcache_fx.integrations.recurrences import substitute_recurrences, takes_recurrences
from vlcache_fx.ir import Captured
from vlcache_fx.passes import Program
from vlcache_fx.passes.standard import CLEANUP


@dataclass(frozen=True)
class TracedGraph:
    """Arguments of a backend, and the arguments of every call of its compiled result."""

    graph_module: torch.fx.GraphModule
    example_inputs: list[Any]
    calls: list[tuple[Any, ...]]


def traced_graphs(
    model: nn.Module,
    *calls: Mapping[str, Any],
    dynamic: bool | None = None,
    seen: Callable[[torch.fx.GraphModule, list[Any]], object] | None = None,
) -> list[TracedGraph]:
    """Return the graphs of ``model`` under ``torch.compile``, for ``calls`` in order.

    Args:
        model: unchanged.
        calls: keyword arguments of each call.
        dynamic: see ``torch.compile``.
        seen: called like a backend, while Dynamo knows the sources of inputs.
    """
    graphs: list[TracedGraph] = []

    @takes_recurrences
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
    substitute_recurrences(model)
    compiled = torch.compile(model, backend=record, dynamic=dynamic)
    with torch.no_grad():
        for call in calls:
            compiled(**call)
    return graphs


def captured_graph(
    model: nn.Module, *calls: Mapping[str, Any], dynamic: bool | None = None
) -> tuple[Captured, TracedGraph]:
    """Return the single graph of ``model`` for all ``calls``, captured and cleaned up like in the backend."""
    captures: list[Captured] = []
    graphs = traced_graphs(
        model, *calls, dynamic=dynamic, seen=lambda *given: captures.append(capture_dynamo(*given))
    )
    (captured,), (graph,) = captures, graphs
    CLEANUP.run(Program(captured.graph_module))
    return captured, graph
