"""Canonical text of the computation of stored rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vlcache_fx.analysis.attention.sites import Site, site_of
from vlcache_fx.analysis.decoder.facts import DecoderFacts
from vlcache_fx.analysis.decoder.leaves import LeafFinder
from vlcache_fx.analysis.decoder.lengths import ANY, Lengths
from vlcache_fx.analysis.decoder.merge import MERGE_OPS
from vlcache_fx.analysis.randomness import DROPOUTS, draws_numbers
from vlcache_fx.analysis.recurrences import convolution_of, recurrence_of
from vlcache_fx.analysis.tokens.axis import rank_of, shape_of
from vlcache_fx.errors import Reason
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.ir.dataflow import carries_data
from vlcache_fx.ir.digest import ComputationWriter, argument_text, target_text
from vlcache_fx.ir.nodes import CASTS, COPIES, NO_BOUND, PERMUTES, RESHAPES, VIEWS, packet_of, slice_bounds
from vlcache_fx.ir.refusal import refuse
from vlcache_fx.keys.digest import content_digest

aten = torch.ops.aten

SIZED = frozenset(
    {aten.full, aten.zeros, aten.ones, aten.empty, aten.new_full, aten.new_zeros, aten.new_ones, aten.arange}
    | {aten.new_empty, aten.repeat, aten.constant_pad_nd, aten.split, aten.split_with_sizes, aten.narrow}
)
"""Operators with an argument that may be a length."""

WITHOUT_EFFECT = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking", "copy"})
"""Keyword arguments without effect on values."""


class RowWriter(ComputationWriter):
    """Writer of the computation of a decoder's rows.

    Until ``include_embeddings``, the token embeddings of the first layer are a single word.

    Args:
        captured, facts: the graph and its facts.
        unifies: write all leaves of one kind alike.

    Attributes:
        leaves: the leaves so far.
        more_weights: weights so far that are not in ``facts.weights``, in order.
    """

    def __init__(self, captured: Captured, facts: DecoderFacts, *, unifies: bool = False) -> None:
        super().__init__(captured.graph_module, {})
        self._unifies = unifies
        self._start: Node | None = facts.stream.boundaries[0]
        self._weights = {node: index for index, node in enumerate(facts.weights)}
        self._is_weight = set(captured.inputs_of(InputKind.WEIGHT))
        self._deepstack = {entry.node: index for index, entry in enumerate(facts.deepstack)}
        paths = [path for pair in facts.caches for path in pair if path is not None]
        self._own_rows = {op.node: op.own for path in paths for op in path.ops}
        self._lengths = Lengths(facts)
        self.leaves = LeafFinder(captured, facts, self._lengths)
        self.more_weights: list[Node] = []

    def include_embeddings(self) -> None:
        """From now on, write the computation of the token embeddings too."""
        if self._start is not None:
            self.texts.pop(self._start, None)
        self._start = None

    def reads(self, node: Node) -> Sequence[Node]:
        """See ``ComputationWriter.reads``."""
        if (
            node is self._start
            or self.leaves.is_leaf(node)
            or node in self._deepstack
            or node.op != "call_function"
        ):
            return ()
        if node in self._own_rows:
            return (self._own_rows[node],)
        if node.target in MERGE_OPS:
            return (_first(node),)
        site = site_of(node) if carries_data(node) else None
        if site is not None:
            return [
                operand for operand in (site.query, site.key, site.value, site.sinks) if operand is not None
            ]
        if packet_of(node) in COPIES | VIEWS | CASTS:
            return (_first(node),)
        carried = recurrence_of(node)
        if carried is not None:
            return carried.operands
        if convolution_of(node) is not None:
            return node.all_input_nodes[: 3 if node.args[2:] and node.args[2] is not None else 2]
        sized = packet_of(node) in SIZED or packet_of(node) in (aten.slice, aten.select)
        return [
            operand
            for operand in node.all_input_nodes
            if carries_data(operand) or not (sized and self._lengths.expression(operand) is not None)
        ]

    def write(self, node: Node) -> str:
        """See ``ComputationWriter.write``.

        Raises:
            UnsupportedGraphError: RANDOM, if ``node`` draws random numbers.
        """
        if node is self._start:
            return "embeddings"
        if self.leaves.is_leaf(node):
            number = self.leaves.number(node, is_beside=self._start is not None)
            return f"leaf {'' if self._unifies else number} {self.leaves.found[node].kind}"
        if node in self._deepstack:
            return f"addition {self._deepstack[node]}"
        if node.op == "placeholder":
            return self._weight(node) if node in self._is_weight else f"past {self._dtype_and_shape(node)}"
        if node.op == "get_attr":
            return super().write(node)
        if node in self._own_rows:
            return self.texts[self._own_rows[node]]
        if node.target in MERGE_OPS:
            # Once for all modalities: keys contain the merged tokens and features by value.
            embeddings = _first(node)
            text = self.texts[embeddings]
            return text if embeddings.target in MERGE_OPS else content_digest(["merged", text])
        if draws_numbers(node):
            raise refuse(Reason.RANDOM, node, f"{node.target} draws random numbers")
        if recurrence_of(node) is not None or convolution_of(node) is not None:
            # Without the states of earlier calls, which are known to be none where rows are stored.
            operands = [self.texts[operand] for operand in self.reads(node)]
            return content_digest([target_text(node.target), *operands, argument_text(node.kwargs, repr)])
        site = site_of(node) if carries_data(node) else None
        return self._site(site) if site is not None else self._operator(node)

    def _weight(self, node: Node) -> str:
        if node in self._weights:
            return f"weight {self._weights[node]}"
        if node not in self.more_weights:
            self.more_weights.append(node)
        return f"other weight {self.more_weights.index(node)}"

    def _site(self, site: Site) -> str:
        width = shape_of(site.query)[-1]
        scale = site.scale
        if scale is None and isinstance(width, int):
            scale = 1 / math.sqrt(width)
        sinks = "" if site.sinks is None else self.texts[site.sinks]
        operands = [self.texts[operand] for operand in (site.query, site.key, site.value)]
        return content_digest(["attention", *operands, sinks, repr(scale), repr(site.softcap)])

    def _operator(self, node: Node) -> str:
        packet = packet_of(node)
        if packet in COPIES | DROPOUTS:
            return self.texts[_first(node)]
        if packet in CASTS:
            before, after = (cast.meta["val"].dtype for cast in (_first(node), node))
            text = self.texts[_first(node)]
            return text if before == after else content_digest(["cast", str(after), text])
        if packet in RESHAPES or packet is aten.expand:
            return self._view(node, "expand" if packet is aten.expand else "view")
        if packet in PERMUTES:
            return content_digest(["permute", _order(node), self.texts[_first(node)]])
        if packet is aten.slice:
            return self._slice(node)
        return content_digest([target_text(node.target), self._dtype_and_shape(node), self._arguments(node)])

    def _view(self, node: Node, kind: str) -> str:
        """Return the text of a chain of views: its source and last shape."""
        source = _first(node)
        while kind == "view" and packet_of(source) in RESHAPES | COPIES and not self.leaves.is_leaf(source):
            source = _first(source)
        shape = self._lengths.shape(node)
        if shape == self._lengths.shape(source):
            return self.texts[source]
        return content_digest([kind, shape, self.texts[source]])

    def _slice(self, node: Node) -> str:
        source = _first(node)
        dim, start, end, step = slice_bounds(node)
        size = shape_of(source)[dim]
        if isinstance(end, int) and (end == NO_BOUND or (isinstance(size, int) and end >= size)):
            end = None
        bounds = [self._bound(value) for value in (start or 0, end)]
        if bounds == [0, None] and step == 1:
            return self.texts[source]
        return content_digest(["slice", dim % rank_of(source), repr(bounds), repr(step), self.texts[source]])

    def _bound(self, value: Any) -> Any:
        """Return a length, the leaf of another number of the request, or a constant, as text."""
        if not isinstance(value, Node):
            return ANY if self._lengths.is_number(value) else value
        return self.texts[value] if value in self.texts else self._lengths.expression(value)

    def _dtype_and_shape(self, node: Node) -> str:
        """Return dtype and shape of a result, which distinguish operators with sizes as arguments."""
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return f"{value.dtype} {self._lengths.shape(node)}"
        return type(value).__name__

    def _arguments(self, node: Node) -> str:
        sized = packet_of(node) in SIZED

        def leaf(value: Any) -> str:
            match value:
                case Node():
                    return str(self._bound(value))
                case int() if sized and not isinstance(value, bool) and self._lengths.is_number(value):
                    return ANY
                case torch.device() | torch.layout() | torch.memory_format():
                    return ""
            return repr(value)

        named = {key: value for key, value in node.kwargs.items() if key not in WITHOUT_EFFECT}
        return f"{argument_text(node.args, leaf)} {argument_text(named, leaf)}"


def _first(node: Node) -> Node:
    first = node.args[0]
    assert isinstance(first, Node)
    return first


def _order(node: Node) -> str:
    """Return the permutation of dimensions by a node, as text."""
    probe = torch.empty(tuple(range(2, 2 + rank_of(node))), device="meta")
    call: Callable[..., Tensor] = node.target  # type: ignore[assignment]
    moved = call(probe, *node.args[1:], **node.kwargs)
    return str([size - 2 for size in moved.shape])
