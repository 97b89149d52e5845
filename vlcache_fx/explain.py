"""What would happen to a model's graphs, and why, without compiling anything."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import fx

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.capture import capture_dynamo
from vlcache_fx.capture.decode_steps import is_decoding_step
from vlcache_fx.capture.dynamo_settings import DYNAMO_CONFIG
from vlcache_fx.compiling import compiling, dynamo_settings
from vlcache_fx.errors import PassError, UnsupportedGraphError
from vlcache_fx.ir import Captured
from vlcache_fx.lowering.tensorrt import dry_run
from vlcache_fx.passes import Program
from vlcache_fx.passes.classify import classify
from vlcache_fx.passes.partition.split_encoder import SplitEncoder
from vlcache_fx.passes.standard import CLEANUP, cold_program, warm_program

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a call."""


@dataclass(frozen=True)
class GraphExplanation:
    """One traced graph.

    Attributes:
        kind: ``decoder`` (rewritten), ``encoder`` (kept under its input's content), ``merge`` (marks spans
            for the decoder's graph), ``cross-attending decoder`` (what it computes of the items is kept),
            ``decoding step`` (nothing to reuse) or ``unmodified``.
        reason: why it is unmodified; None otherwise.
        num_layers: decoder layers found.
        merges: graph nodes at which encoder features enter the token embeddings.
        encoder_in_graph: True where the features are computed in the same graph.
        key_frontiers, value_frontiers: per layer that has its own, the nodes whose rows are stored.
        attention: per layer, ``causal`` or ``mask``.
        results_need: ``all rows`` or the selection that says which rows follow the last layer.
        nodes: number of graph nodes captured, and in the cold and warm programs.
        engines: of the warm program under ``lowering="tensorrt"``, the nodes of each engine.
        outside_engines: and the nodes that would stay outside, with the reason.
    """

    kind: str
    reason: str | None = None
    num_layers: int = 0
    merges: tuple[str, ...] = ()
    encoder_in_graph: bool = False
    key_frontiers: tuple[str, ...] = ()
    value_frontiers: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    results_need: str = ""
    nodes: tuple[int, ...] = ()
    engines: tuple[tuple[str, ...], ...] = ()
    outside_engines: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable form."""
        return asdict(self)


def explain_graph(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> GraphExplanation:
    """Explain one graph as Dynamo hands it over."""
    with compiling():
        return _explain_graph(graph_module, example_inputs)


def _explain_graph(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> GraphExplanation:
    try:
        captured = capture_dynamo(graph_module, example_inputs)
        CLEANUP.run(Program(captured.graph_module))
        found = classify(captured)
        if found.facts is not None:
            return _explain_decoder(captured, found.facts, found.split)
    except (UnsupportedGraphError, PassError) as refusal:
        is_step = is_decoding_step(graph_module.graph)
        return GraphExplanation("decoding step" if is_step else "unmodified", str(refusal))
    return GraphExplanation(
        str(found.kind),
        encoder_in_graph=found.split is not None,
        nodes=(len(captured.graph_module.graph.nodes),),
    )


def _explain_decoder(captured: Captured, facts: DecoderFacts, split: SplitEncoder | None) -> GraphExplanation:
    """``facts`` are of the whole graph, programs are made of the decoder in it."""
    selection = facts.tail_rows.selection
    decoder = captured if split is None else split.decoder
    own = facts if split is None else facts.without_encoder(split.nodes)
    programs = (cold_program(decoder, facts=own), warm_program(decoder, facts=own))
    engines = dry_run(programs[1].graph_module)
    return GraphExplanation(
        kind="decoder",
        num_layers=facts.num_layers,
        merges=tuple(merge.node.name for merge in facts.merges),
        encoder_in_graph=bool(facts.encoder),
        key_frontiers=tuple(one.node.name for one in facts.frontiers if one.slot.endswith("k")),
        value_frontiers=tuple(one.node.name for one in facts.frontiers if one.slot.endswith("v")),
        attention=tuple("causal" if layer.site.mask is None else "mask" for layer in facts.layers),
        results_need="all rows" if selection is None else str(selection.format_node()),
        nodes=(
            len(captured.graph_module.graph.nodes),
            *(len(program.graph.nodes) for program in programs),
        ),
        engines=engines.engines,
        outside_engines=dict(engines.outside),
    )


def explain(
    function: Callable[..., Any],
    inputs: dict[str, Any],
    prepared: Callable[[tuple[Any, ...], dict[str, Any]], Arguments] = lambda args, kwargs: (args, kwargs),
    dynamic: bool | None = None,
) -> tuple[GraphExplanation, ...]:
    """Trace ``function(**inputs)`` (it runs once, without reuse) and explain each of its graphs.

    Args:
        function: the plain forward.
        inputs: its keyword arguments.
        prepared: what a compiled model makes of the arguments of a call before they are traced.
        dynamic: as in ``torch.compile``.
    """
    found: list[GraphExplanation] = []

    def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(explain_graph(graph_module, example_inputs))
        return graph_module.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    # Dynamo keeps and counts what it compiled per code object: with one of its own, no explanation adds to
    # what real calls have to search, and none is left out because a limit is reached.
    traced = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    with torch.no_grad(), dynamo_settings(DYNAMO_CONFIG):
        args, kwargs = prepared((), inputs)
        torch.compile(traced, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return tuple(found)
