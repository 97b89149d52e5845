"""What a key-value cache does between a layer's frontiers and its attention.

New keys and values join those of earlier calls: by ``cat``, or as rows written into a buffer. Sliding caches
cut what they joined. Everything there runs on all tokens, so rewriting needs none of it; but where this
call's tokens lie among the keys decides what a mask says about them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from vlcache_fx.analysis.decoder.layers import LayerSplit
from vlcache_fx.analysis.tokens.axis import TokenAxis, TokenFlow, shape_of
from vlcache_fx.analysis.tokens.follow import follow_tokens
from vlcache_fx.errors import UnsupportedGraphError
from vlcache_fx.ir.dataflow import NodeSet, ancestors, data_inputs, in_graph_order, reachable
from vlcache_fx.ir.nodes import is_full_slice
from vlcache_fx.ir.scatters import scattered_rows

aten = torch.ops.aten


@dataclass(frozen=True)
class CacheOp:
    """A node that changes which token lies where: ``cat``, rows written into a buffer, or a slice.

    Attributes:
        node: the call.
        own: its operand with this call's tokens.
        others: tensors whose rows it puts beside them.
    """

    node: Node
    own: Node
    others: tuple[Node, ...] = ()


@dataclass(frozen=True)
class CachePath:
    """The way of one operand, K or V, from its frontier to the attention.

    Attributes:
        ops: in order; each reads the result of the previous one.
        is_known: False where something else on the way moves tokens.
    """

    ops: tuple[CacheOp, ...]
    is_known: bool

    @property
    def past(self) -> tuple[Node, ...]:
        """Tensors with rows of earlier calls, or with room for those of later ones."""
        return tuple(other for op in self.ops for other in op.others)


def cache_paths(
    layers: Sequence[LayerSplit], flows: Mapping[Node, TokenFlow], stream: NodeSet, position: dict[Node, int]
) -> tuple[tuple[CachePath | None, CachePath | None], ...]:
    """Each layer's paths of keys and values, its own or an earlier layer's; None where they are of no token
    of this call."""
    paths = []
    behind: NodeSet = {}
    frontiers: list[Node] = []
    for layer in layers:
        behind |= layer.full_part
        frontiers += [one for one in (layer.key_frontier, layer.value_frontier) if one is not None]
        found: list[CachePath | None] = []
        for own, operand in (
            (layer.key_frontier, layer.site.key),
            (layer.value_frontier, layer.site.value),
        ):
            reached = ancestors([operand], {**dict.fromkeys(frontiers), **behind, **layer.q_part})
            source = own or next((one for one in reversed(frontiers) if one in reached), None)
            if source is not None:
                found.append(cache_path(source, flows[source].axis, operand, reached, position))
            else:
                found.append(CachePath((), is_known=False) if operand in stream else None)
        paths.append((found[0], found[1]))
    return tuple(paths)


def cache_path(
    frontier: Node, axis: TokenAxis, operand: Node, inside: NodeSet, position: dict[Node, int]
) -> CachePath:
    """Follow the tokens of one layer's keys, or of its values.

    Args:
        frontier: where they come from, with the tokens along ``axis``.
        axis: see there.
        operand: of the attention, with the tokens in the last but one dimension.
        inside: what lies between, and maybe more.
        position: each node's index in the graph.
    """
    path = ancestors([operand], {frontier: None, **inside})
    axes = {frontier: axis}
    ops = []
    for node in in_graph_order(path, position):
        if node is frontier:
            continue
        found = _cache_op(node, axes)
        if found is not None:
            op, axes[node] = found
            ops.append(op)
            continue
        try:
            axes[node] = follow_tokens(node, axes).axis
        except UnsupportedGraphError:  # scales over all tokens, say: what reads them may still be followed
            continue
    ends_well = operand in axes and axes[operand].dim == len(shape_of(operand)) - 2
    ends = [*(op.node for op in ops), operand]
    starts = [op.own for op in ops[1:]] + [operand]
    is_chain = all(before in ancestors([after], path) for before, after in zip(ends, starts, strict=False))
    return CachePath(tuple(ops), ends_well and is_chain)


def _cache_op(node: Node, axes: Mapping[Node, TokenAxis]) -> tuple[CacheOp, TokenAxis] | None:
    """Return ``node`` as a cache operation, and the token axis of its result; None if it moves no tokens."""
    rows = scattered_rows(node)
    own: Any
    if rows is not None:
        own, dim, _ = rows
        others: list[Any] = [node.args[0]]
    elif node.target is aten.cat.default or (node.target is aten.slice.Tensor and not is_full_slice(node)):
        given: Any = node.args[0] if node.target is aten.cat.default else node.args[:1]
        dim = int(node.args[1] if len(node.args) > 1 else 0) % len(shape_of(node))  # type: ignore[arg-type]
        parts = [part for part in given if part in axes]
        if len(parts) != 1:
            return None
        own, others = parts[0], [part for part in given if part is not parts[0]]
    else:
        return None
    if own not in axes or axes[own].token_dim + len(shape_of(node)) - len(shape_of(own)) != dim:
        return None
    if any(other in axes for other in others):
        return None
    return CacheOp(node, own, tuple(others)), TokenAxis(dim)


def sources_of_rows(operand: Node) -> NodeSet:
    """Everything the rows of ``operand`` are computed from.

    Where rows are written into a buffer, neither their indices nor the old buffer count.
    """

    def sources(node: Node) -> Iterable[Node]:
        rows = scattered_rows(node)
        return data_inputs(node) if rows is None else (rows[0],)

    return reachable([operand], sources)
