"""One layer of a decoder before and after the passes, as plain data for explanations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.ir import Captured
from vlcache_fx.ir.nodes import NO_BOUND, packet_of
from vlcache_fx.ir.refusal import source_line, without_folders
from vlcache_fx.passes import Program
from vlcache_fx.spec.slots import Keep, Positions, Results, Rows

SPLICES = frozenset({torch.ops.vlcache.lookup, torch.ops.vlcache.splice_rows, torch.ops.vlcache.fit_rows})
"""Operators at which stored rows enter a layer."""

GATHERS = frozenset({torch.ops.aten.index_select, torch.ops.aten.index, torch.ops.vlcache.take_rows})
"""Operators that gather rows."""

LONGEST_LINE = 240

TORCH = "/torch/nn/"
"""Part of the paths of torch's own modules, which are not the model's code."""


@dataclass(frozen=True)
class NodeLine:
    """One node of a graph.

    Attributes:
        name: its name; a node that passes keep has the same name before and after.
        text: what it computes, such as ``aten.linear(rms_norm, weight)``.
        shape: shape of its result, such as ``1 x s27 x 64``; empty for results that are no tensors, and after
            passes, which change it.
        source: line of the traced code, ``"file.py", line 3, in forward: code``; empty where unknown.
        marks: of ``frontier`` (its rows are stored), ``lookup`` (stored rows enter), ``attention``,
            ``recurrent`` and ``rows`` (gathers active rows).
    """

    name: str
    text: str
    shape: str = ""
    source: str = ""
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerGraph:
    """A layer before and after the passes of the warm program.

    Attributes:
        index: index of the layer, from 0: the first that recurs with the same operators.
        repeats: number of layers with the same operators.
        before: its nodes after clean-up.
        after: its nodes in the warm program, with the inputs that passes added for it.
    """

    index: int
    repeats: int
    before: tuple[NodeLine, ...]
    after: tuple[NodeLine, ...]


def layer_graph(
    captured: Captured, facts: DecoderFacts, warm: Program, names: Mapping[str, str]
) -> LayerGraph | None:
    """Return the first layer that recurs, or the first one; None for programs that are not cut into layers.

    Args:
        captured: the decoder's graph after clean-up.
        facts: its analysis.
        warm: its warm program; kept nodes have the names that they have in ``captured``.
        names: names of weights in the model, by name of their nodes.
    """
    layers = [_of_layer(warm.graph, index) for index in range(facts.num_layers)]
    operators = [tuple(str(node.target) for node in nodes) for nodes in layers]
    counts = Counter(operators)
    index = next((number for number, own in enumerate(operators) if counts[own] > 1), 0)
    if not layers or not layers[index]:
        return None
    inputs = {node: slot for slot, node in warm.slots.items()}
    read = {used for node in layers[index] for used in node.all_input_nodes if used in inputs}
    added = [node for node in warm.graph.nodes if node in read]
    indices = {node for node, slot in inputs.items() if isinstance(slot, Rows | Keep | Positions | Results)}
    marks = _marks(facts, index)
    by_name = {node.name: own for node, own in marks.items()}
    kept = {node.name for node in layers[index]} | {node.name for node in facts.stream.members[index]}
    before = [
        node for node in captured.graph_module.graph.nodes if node.op == "call_function" and node.name in kept
    ]
    after = [
        replace(line, shape=line.shape if node in read else "")
        for node, line in (
            (node, _line(node, names, by_name.get(node.name, ()) + _added_marks(node, indices)))
            for node in [*added, *layers[index]]
        )
    ]
    return LayerGraph(
        index,
        counts[operators[index]],
        tuple(_line(node, names, by_name.get(node.name, ())) for node in before),
        tuple(after),
    )


def _of_layer(graph: fx.Graph, index: int) -> list[Node]:
    segment = f"layer.{index}"
    return [node for node in graph.nodes if node.meta.get("segment") == segment]


def _marks(facts: DecoderFacts, index: int) -> dict[Node, tuple[str, ...]]:
    """Return what analysis found at nodes of a layer."""
    layer = facts.layers[index]
    found: dict[Node, tuple[str, ...]] = {}
    for node in (layer.key_frontier, layer.value_frontier):
        if node is not None:
            found[node] = ("frontier",)
    recurrent = [recurrence.node for recurrence in layer.recurrences]
    for node in [*recurrent, *(convolution.node for convolution in layer.convolutions)]:
        found[node] = (*found.get(node, ()), "recurrent")
    if layer.site is not None:
        found[layer.site.node] = (*found.get(layer.site.node, ()), "attention")
    return found


def _added_marks(node: Node, indices: set[Node]) -> tuple[str, ...]:
    if packet_of(node) in SPLICES:
        return ("lookup",)
    gathers = packet_of(node) in GATHERS and any(used in indices for used in node.all_input_nodes)
    return ("rows",) if gathers else ()


def _line(node: Node, names: Mapping[str, str], marks: tuple[str, ...]) -> NodeLine:
    source = without_folders(source_line(node, skipped=TORCH)) or ""
    return NodeLine(node.name, node_text(node, names), _shape(node.meta.get("val")), source, marks)


def node_text(node: Node, names: Mapping[str, str]) -> str:
    """Return what a node computes, in one line. ``names`` replaces names of its arguments."""
    if node.op != "call_function":
        return "input" if node.op == "placeholder" else f"{node.op} {node.target}"
    is_operator = isinstance(node.target, torch._ops.OpOverload)
    target = str(node.target) if is_operator else getattr(node.target, "__name__", str(node.target))
    named = [f"{name}={_argument(value, names)}" for name, value in node.kwargs.items()]
    shown = [_argument(value, names) for value in node.args]
    text = f"{target.removesuffix('.default')}({', '.join([*shown, *named])})"
    return text if len(text) <= LONGEST_LINE else f"{text[: LONGEST_LINE - 4]} ..."


def _argument(value: Any, names: Mapping[str, str]) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(item, names) for item in value)}]"
    if isinstance(value, Node):
        return names.get(value.name, value.name)
    return "end" if value == NO_BOUND else str(value)


def _shape(value: Any) -> str:
    return " x ".join(map(str, value.shape)) if isinstance(value, Tensor) else ""
