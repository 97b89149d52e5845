"""Operations of a KV cache between a layer's frontiers and its attention.

New keys and values are joined with those of earlier calls by ``cat`` or by writing rows into a buffer.
Sliding caches then slice the result. All of this runs on all tokens, so rewriting leaves it alone; but masks
are read by the position of this call's tokens among the keys.

    cat:   past0 past1 | t0 t1        write: past0 past1 t0 t1 free free        slice: past1 t0 t1
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
    """A node that changes the positions of tokens: ``cat``, a write of rows into a buffer, or a slice.

    Attributes:
        node: the call.
        own: the operand with this call's tokens.
        others: operands with other rows.
    """

    node: Node
    own: Node
    others: tuple[Node, ...] = ()


@dataclass(frozen=True)
class CachePath:
    """The path of K or V from its frontier to the attention.

    Attributes:
        ops: in order; each reads the result of the previous one.
        is_known: False where something else on the way moves tokens.
    """

    ops: tuple[CacheOp, ...]
    is_known: bool

    @property
    def past(self) -> tuple[Node, ...]:
        """Tensors with rows of earlier calls, or with room for rows of later calls."""
        return tuple(other for op in self.ops for other in op.others)


def cache_paths(
    layers: Sequence[LayerSplit], flows: Mapping[Node, TokenFlow], stream: NodeSet, position: dict[Node, int]
) -> tuple[tuple[CachePath | None, CachePath | None], ...]:
    """Return the cache paths of each layer's keys and values, which may be those of an earlier layer.

    A path is None if its operand has no tokens of this call.
    """
    paths: list[tuple[CachePath | None, CachePath | None]] = []
    full: NodeSet = {}
    frontiers: list[Node] = []
    for layer in layers:
        if layer.site is None:
            paths.append((None, None))
            continue
        full |= layer.full_part
        frontiers += [node for node in (layer.key_frontier, layer.value_frontier) if node is not None]
        found: list[CachePath | None] = []
        for own, operand in (
            (layer.key_frontier, layer.site.key),
            (layer.value_frontier, layer.site.value),
        ):
            reached = ancestors([operand], {**dict.fromkeys(frontiers), **full, **layer.q_part})
            source = own or next((node for node in reversed(frontiers) if node in reached), None)
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
        frontier: their frontier.
        axis: token axis of ``frontier``.
        operand: key or value operand of the attention, with tokens in dimension -2.
        inside: the nodes between, and possibly others.
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
        except UnsupportedGraphError:  # such as scales over all tokens; their readers may still be followed
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
        operands: Any = node.args[0] if node.target is aten.cat.default else node.args[:1]
        dim = int(node.args[1] if len(node.args) > 1 else 0) % len(shape_of(node))  # type: ignore[arg-type]
        parts = [part for part in operands if part in axes]
        if len(parts) != 1:
            return None
        own, others = parts[0], [part for part in operands if part is not parts[0]]
    else:
        return None
    if own not in axes or axes[own].token_dim + len(shape_of(node)) - len(shape_of(own)) != dim:
        return None
    if any(other in axes for other in others):
        return None
    return CacheOp(node, own, tuple(others)), TokenAxis(dim)


def sources_of_rows(operand: Node) -> NodeSet:
    """Return the nodes that the rows of ``operand`` are computed from.

    For rows written into a buffer, the indices and the old buffer are left out.
    """

    def sources(node: Node) -> Iterable[Node]:
        rows = scattered_rows(node)
        return data_inputs(node) if rows is None else (rows[0],)

    return reachable([operand], sources)
