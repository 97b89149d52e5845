"""Explains a model's graphs without compiling them."""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import fx

from vlcache_fx.capture.dynamo_settings import DYNAMO_CONFIG
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.explanation import GraphExplanation
from vlcache_fx.compiler.kinds import on_kind
from vlcache_fx.compiler.traced import STANDARD, Traced
from vlcache_fx.compiling import dynamo_settings
from vlcache_fx.integrations.recurrences import takes_recurrences
from vlcache_fx.passes.configured import Pipelines

__all__ = ["Arguments", "GraphExplanation", "explain", "explain_graph"]

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a call."""


def explain_graph(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], pipelines: Pipelines
) -> GraphExplanation:
    """Explain one graph that Dynamo traced."""
    return on_kind(Traced.by_dynamo(graph_module, example_inputs, pipelines), lambda kind: kind.explain())


def explain(
    function: Callable[..., Any],
    inputs: dict[str, Any],
    prepared: Callable[[tuple[Any, ...], dict[str, Any]], Arguments] = lambda args, kwargs: (args, kwargs),
    dynamic: bool | None = None,
    pipelines: Pipelines = STANDARD,
    observer: Engine | None = None,
) -> tuple[GraphExplanation, ...]:
    """Trace ``function(**inputs)`` and explain each of its graphs.

    It runs once: without reuse, or as ``observer`` computes it.

    Args:
        function: the plain forward.
        inputs: its keyword arguments.
        prepared: prepares arguments for tracing, as a compiled model does.
        dynamic: as in ``torch.compile``.
        pipelines: the passes for its graphs.
        observer: compiles the graphs, to be called once; None runs them as they are.
    """
    engines = [] if observer is None else [observer]
    explained: list[GraphExplanation] = []

    @takes_recurrences
    def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if not engines:
            explained.append(explain_graph(graph_module, example_inputs, pipelines))
            return graph_module.forward
        graph, engine = Traced.by_dynamo(graph_module, example_inputs, pipelines), engines[0]
        found, compiled = on_kind(graph, lambda kind: (kind.explain(), kind.compile(engine)))
        explained.append(found)
        return graph.entry(compiled)

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    # Dynamo caches and counts compilations per code object. With a code object of its own, an explanation
    # neither slows the search of real calls nor fails at their ``recompile_limit``.
    traced = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    try:
        with torch.no_grad(), dynamo_settings(DYNAMO_CONFIG):
            args, kwargs = prepared((), inputs)
            torch.compile(traced, backend=backend, dynamic=dynamic)(*args, **kwargs)
    finally:
        engines.clear()  # Dynamo may keep the backend, which must not keep a store
    return tuple(explained)
