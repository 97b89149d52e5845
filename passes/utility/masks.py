"""Combine the terms that mask or bias scores into one attention mask."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from vlcache_fx.analysis.attention.scores import Term
from vlcache_fx.passes.base import Program
from vlcache_fx.passes.utility.insert import insert_call

aten = torch.ops.aten


class Masks:
    """Masks that a pass builds in a program. Equal masks are built once.

    A single bool term with the fill value -inf stays a bool mask. All other terms become an additive mask;
    finite fill values become ``finfo.min`` of the scores' dtype, so a fully masked row attends uniformly, as
    in the original. Layers that compute equal masks share the first. (Torch's common subexpression passes
    would share all equal expressions, which makes layers differ, and each would be compiled.)
    """

    def __init__(self, program: Program) -> None:
        self._graph = program.graph
        self._made: dict[tuple[object, ...], Node] = {}
        self._first: dict[Node, Node] = {}
        self._computed: dict[tuple[object, str], Node] = {}

    def joined(self, terms: Sequence[Term], dtype: torch.dtype, rank: int, origin: Node) -> Node | None:
        """Return a mask of two or four dimensions for an attention call, or None without terms.

        Args:
            terms: the terms, in the order of application.
            dtype: dtype of the scores.
            rank: number of dimensions of the scores in the graph.
            origin: source of the call. The mask is inserted before the first call that needs it.
        """
        if not terms:
            return None
        terms = [replace(term, node=self._first_of(term.node)) for term in terms]
        key = (*terms, dtype, rank)
        if key not in self._made:
            self._made[key] = self._in_heads(self._of(terms, dtype, origin), rank, origin)
        return self._made[key]

    def _first_of(self, node: Node) -> Node:
        """Return the first node with the same operator and equal operands."""
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(
            node.target, "tags", ()
        ):
            return node
        if node not in self._first:
            given = map_arg((node.args, node.kwargs), self._first_of)
            self._first[node] = self._computed.setdefault((node.target, repr(given)), node)
        return self._first[node]

    def _of(self, terms: Sequence[Term], dtype: torch.dtype, origin: Node) -> Node:
        first = terms[0]
        if len(terms) == 1 and first.kind != "added" and first.number == -math.inf:
            return first.node if first.kind == "visible" else self._negated(first.node, origin)
        result: Node | None = None
        for term in terms:
            if term.kind == "added":
                part = term.node
                if term.number != 1.0:
                    part = insert_call(self._graph, aten.mul.Tensor, part, term.number, origin=origin)
                result = part if result is None else self._sum(result, part, origin)
            else:
                result = self._hiding(term, result, dtype, origin)
        assert result is not None
        return result

    def _negated(self, node: Node, origin: Node) -> Node:
        if node.target in (aten.logical_not.default, aten.bitwise_not.default):
            source = node.args[0]
            if isinstance(source, Node) and source.meta["val"].dtype == torch.bool:
                return source
        return insert_call(self._graph, aten.logical_not.default, node, origin=origin)

    def _sum(self, first: Node, second: Node, origin: Node) -> Node:
        return insert_call(self._graph, aten.add.Tensor, first, second, origin=origin)

    def _hiding(self, term: Term, before: Node | None, dtype: torch.dtype, origin: Node) -> Node:
        lowest = -math.inf if term.number == -math.inf else torch.finfo(dtype).min
        if before is None:
            device = term.node.meta["val"].device
            before = insert_call(
                self._graph, aten.zeros.default, [], dtype=dtype, device=device, origin=origin
            )
        if term.kind == "visible":
            arguments: tuple[object, ...] = (term.node, before, lowest)
            return insert_call(self._graph, aten.where.ScalarOther, *arguments, origin=origin)
        arguments = (term.node, lowest, before)
        return insert_call(self._graph, aten.where.ScalarSelf, *arguments, origin=origin)

    def _in_heads(self, mask: Node, rank: int, origin: Node) -> Node:
        dims = mask.meta["val"].dim()
        if rank == 5 and dims == 5:
            mask = insert_call(self._graph, aten.squeeze.dim, mask, 1, origin=origin)
        for _ in range({0: 2, 1: 1, 3: 1}.get(dims, 0)):
            mask = insert_call(self._graph, aten.unsqueeze.default, mask, 0, origin=origin)
        return mask
