"""What would happen to a model's graphs, and why, without compiling anything."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import fx

from vlcache_fx.analysis import analyze
from vlcache_fx.analysis.encoder import is_encoder
from vlcache_fx.capture import capture_dynamo
from vlcache_fx.compiling import compiling
from vlcache_fx.errors import UnsupportedGraphError
from vlcache_fx.lowering.tensorrt import dry_run
from vlcache_fx.passes import Program
from vlcache_fx.passes.standard import CLEANUP, cold_program, warm_program


@dataclass(frozen=True)
class GraphExplanation:
    """One traced graph.

    Attributes:
        kind: ``decoder`` (rewritten), ``encoder`` (kept under its input's content) or ``unmodified``.
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
        if is_encoder(captured):
            return GraphExplanation("encoder", nodes=(len(captured.graph_module.graph.nodes),))
        facts = analyze(captured)
    except UnsupportedGraphError as refusal:
        return GraphExplanation("unmodified", str(refusal))
    selection = facts.tail_rows.selection
    programs = (cold_program(captured), warm_program(captured))
    split = dry_run(programs[1].graph_module)
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
        engines=split.engines,
        outside_engines=dict(split.outside),
    )


def explain(function: Callable[..., Any], **inputs: Any) -> tuple[GraphExplanation, ...]:
    """Trace ``function(**inputs)`` (it runs once, without reuse) and explain each of its graphs."""
    found: list[GraphExplanation] = []

    def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(explain_graph(graph_module, example_inputs))
        return graph_module.forward

    with (
        torch.no_grad(),
        torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True),
    ):
        torch.compile(function, backend=backend)(**inputs)
    return tuple(found)
