"""The token axis through mixtures of experts: tokens sorted by expert, multiplied in groups, sorted back.

Each entry goes through its own expert, at any position, so rows can be computed without the others as long as
the second permutation inverts the first. So an axis records the sort of its entries, and a tensor of indices
records the axis that it indexes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from vlcache_fx.analysis.tokens.axis import Axes, Entries, TokenAxis, TokenFlow, rank_of
from vlcache_fx.analysis.tokens.layout_rules import Rule, lost, same, single, with_token_dim
from vlcache_fx.analysis.tokens.math_rules import pointwise
from vlcache_fx.errors import Reason
from vlcache_fx.ir.refusal import refuse
from vlcache_fx.ir.sizes import equal

aten = torch.ops.aten


def _sort(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    if rank_of(operand) != 1 or axis.token_dim != 0:
        raise lost(node, "it sorts a tensor of several dimensions")
    return TokenFlow(TokenAxis(0, _sorted(node, axis)))


def _argsort(node: Node, axes: Axes) -> TokenFlow:
    return TokenFlow(sorted_indices(node, axes))


def _sorted(node: Node, axis: TokenAxis) -> Entries:
    """Return the sorted entries: a sorted permutation has the entries that its values index."""
    if axis.is_permutation and axis.points_at is not None:
        return axis.points_at
    return replace(axis.entries, order=node)


def sorted_indices(node: Node, axes: Axes) -> TokenAxis:
    """Return the axis of a sort's indices: the positions that its values came from, in the new order."""
    operand, axis = single(node, axes)
    if rank_of(operand) != 1 or axis.token_dim != 0:
        raise lost(node, "it sorts a tensor of several dimensions")
    return TokenAxis(0, _sorted(node, axis), axis.entries, is_permutation=True)


def _divide(node: Node, axes: Axes) -> TokenFlow:
    """Return the flow of ``index // experts_per_token``: indices of (token, expert) pairs become tokens."""
    operand, divisor = node.args[:2]
    axis = axes.get(operand) if isinstance(operand, Node) else None
    floors = node.target is not aten.div.Tensor and node.kwargs.get("rounding_mode", "floor") == "floor"
    if axis is None or axis.points_at is None or not isinstance(divisor, int) or not floors:
        return pointwise(node, axes)
    target = axis.points_at
    if not equal(target.inner, divisor) or target.order is not None:
        return pointwise(node, axes)
    return TokenFlow(TokenAxis(axis.token_dim, axis.entries, replace(target, inner=1)))


def _index(node: Node, axes: Axes) -> TokenFlow:
    source, indices = node.args[:2]
    assert isinstance(source, Node)
    assert isinstance(indices, list | tuple)
    used = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(used) != 1 or not isinstance(used[0][1], Node):
        raise lost(node, "it indexes several dimensions")
    dim, index = used[0]
    by_mask = index.meta["val"].dtype in (torch.bool, torch.uint8)
    replaced, added = (rank_of(index), 1) if by_mask else (1, rank_of(index))  # dimensions
    if by_mask and (index in axes or 0 <= axes[source].token_dim - dim < replaced):
        raise refuse(Reason.DATA_DEPENDENT, node, "values decide how many tokens it selects")
    if source not in axes:
        axis = with_token_dim(node, axes[index])
        return TokenFlow(TokenAxis(dim + axis.token_dim, axis.entries))
    axis = with_token_dim(node, axes[source])
    if index in axes:
        index_axis = with_token_dim(node, axes[index])
        target = index_axis.points_at
        if dim != axis.token_dim or target is None or not target.same(axis.entries):
            raise lost(node, "it indexes other tokens")
        return TokenFlow(TokenAxis(dim + index_axis.token_dim, index_axis.entries))
    if dim == axis.token_dim:
        raise lost(node, "it selects some tokens")
    return TokenFlow(axis.at(axis.token_dim + (added - replaced if dim < axis.token_dim else 0)))


def _embedding(node: Node, axes: Axes) -> TokenFlow:
    table, index = node.args[:2]
    if table in axes or not isinstance(index, Node):
        raise lost(node, "its table is computed from tokens")
    axis = with_token_dim(node, axes[index])
    return TokenFlow(axis.at(axis.token_dim))


def _histogram(node: Node, axes: Axes) -> TokenFlow:
    """Return the flow of a histogram: the number of entries per expert."""
    _, axis = single(node, axes)
    bins, low, high = [*node.args[1:], 100, 0, 0][:3]
    if axis.entries.order is None or low != 0 or not isinstance(bins, int) or high != bins - 1:
        raise lost(node, "it counts tokens")
    return TokenFlow(TokenAxis(None, axis.entries))


def _along_counts(node: Node, axes: Axes) -> TokenFlow | None:
    operand = node.args[0]
    counts = isinstance(operand, Node) and operand in axes and axes[operand].dim is None
    return same(node, axes) if counts else None


def _is_grouped_product(node: Node, axes: Axes) -> bool:
    """Return True for an operator of any library on (rows, matrices, ends of groups of rows)."""
    tensors = [arg for arg in node.args if isinstance(arg, Node)]
    if len(tensors) != 3 or not all(
        isinstance(operand.meta.get("val"), torch.Tensor) for operand in (*tensors, node)
    ):
        return False
    rows, matrices, ends = tensors
    counted = ends in axes and axes[ends].dim is None
    ranks = [rank_of(operand) for operand in (rows, matrices, ends, node)]
    return rows in axes and matrices not in axes and counted and ranks == [2, 3, 1, 2]


def _grouped_product(node: Node, axes: Axes) -> TokenFlow:
    rows, _, ends = (arg for arg in node.args if isinstance(arg, Node))
    axis = with_token_dim(node, axes[rows])
    order = axis.entries.order
    if order is None or axis.token_dim != 0 or axes[ends].entries.order is not order:
        raise lost(node, "its groups do not match the order of its rows")
    return TokenFlow(axis.at(axis.token_dim))


def rule_for(node: Node, axes: Axes) -> Rule | None:
    """Return the rule for a node of a mixture of experts; None for other nodes."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is aten.cumsum and _along_counts(node, axes) is not None:
        return same
    if isinstance(node.target, torch._ops.OpOverload) and _is_grouped_product(node, axes):
        return _grouped_product
    return ROUTING_RULES.get(packet)


ROUTING_RULES: Mapping[Any, Rule] = MappingProxyType(
    {
        aten.sort: _sort,
        aten.argsort: _argsort,
        aten.floor_divide: _divide,
        aten.div: _divide,
        aten.index: _index,
        aten.embedding: _embedding,
        aten.histc: _histogram,
    }
)
