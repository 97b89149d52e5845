"""The token axis through operators that change the layout of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from vlcache_fx.analysis.tokens.axis import Axes, Entries, TokenAxis, TokenFlow, rank_of, shape_of
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir.nodes import is_full_slice
from vlcache_fx.ir.refusal import refuse
from vlcache_fx.ir.sizes import equal, expressions, is_one, product, quotient

aten = torch.ops.aten

Rule: TypeAlias = Callable[[Node, Axes], TokenFlow]


def lost(node: Node, why: str) -> UnsupportedGraphError:
    """Return the refusal of an operator that mixes tokens."""
    return refuse(Reason.TOKEN_AXIS_LOST, node, why)


def single(node: Node, axes: Axes) -> tuple[Node, TokenAxis]:
    """Return the first operand and its axis; no other operand has a token axis.

    Raises:
        UnsupportedGraphError: it has none, or another operand has one too.
    """
    operand = node.args[0]
    if not isinstance(operand, Node) or operand not in axes:
        raise lost(node, "its first operand is not part of the residual stream")
    others = [other for other in node.all_input_nodes if other is not operand and other in axes]
    if others:
        raise lost(node, f"{others[0].name} has a second token axis")
    return operand, with_token_dim(node, axes[operand])


def with_token_dim(node: Node, axis: TokenAxis) -> TokenAxis:
    """Return ``axis``.

    Raises:
        UnsupportedGraphError: it is counts over all tokens.
    """
    if axis.dim is None:
        raise lost(node, "it reads counts over all tokens")
    return axis


def dimension(value: Any, rank: int) -> int:
    """Return a dimension as a non-negative number."""
    return int(value) % rank if rank else 0


def same(node: Node, axes: Axes) -> TokenFlow:
    """Return the flow of the same values in the same layout as the first operand."""
    operand = node.args[0]
    if isinstance(operand, Node) and operand in axes and axes[operand].dim is None:
        return TokenFlow(axes[operand])  # counts stay counts
    return TokenFlow(single(node, axes)[1])


def like_first(node: Node, axes: Axes) -> TokenFlow:
    """Return the flow of new values in the layout of the first operand; others only set dtype or device."""
    operand = node.args[0]
    if not isinstance(operand, Node) or operand not in axes:
        raise lost(node, "its first operand is not part of the residual stream")
    axis = with_token_dim(node, axes[operand])
    return TokenFlow(axis.at(axis.token_dim))


def _view(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    found = _regrouped(axis, shape_of(operand), shape_of(node))
    if found is None:
        change = f"{tuple(shape_of(operand))} -> {tuple(shape_of(node))}"
        raise lost(node, f"the view {change} merges the token axis with another")
    return TokenFlow(found, size_argument=(1, found.token_dim))


def _regrouped(axis: TokenAxis, before: Sequence[Any], after: Sequence[Any]) -> TokenAxis | None:
    """Return the axis after a view: the dimension with all tokens, and the sizes merged into it; or None."""
    before, after, entries = expressions(before), expressions(after), axis.entries
    tokens = quotient(before[axis.token_dim], entries.outer * entries.inner)
    if tokens is None:
        return None
    lead = product(before[: axis.token_dim]) * entries.outer
    rest = product(before[axis.token_dim + 1 :]) * entries.inner
    for dim, size in enumerate(after):
        outer, inner = quotient(lead, product(after[:dim])), quotient(rest, product(after[dim + 1 :]))
        if outer is None or inner is None or not equal(size, outer * tokens * inner):
            continue
        moved = Entries(outer, inner, entries.order)
        if entries.order is not None and not moved.same(entries):
            return None  # sorted entries of one token are not adjacent
        points = axis.points_at if moved.same(entries) else None
        return TokenAxis(dim, moved, points, axis.is_permutation and points is not None)
    return None


def _flatten(node: Node, axes: Axes) -> TokenFlow:
    return TokenFlow(_view(node, axes).axis)


def _expand(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    dim = axis.token_dim + rank_of(node) - rank_of(operand)
    return TokenFlow(axis.at(dim), size_argument=(1, dim))


def _repeat(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    times = node.args[1]
    assert isinstance(times, Sequence)
    dim = axis.token_dim + rank_of(node) - rank_of(operand)
    if axis.entries.order is not None:
        raise lost(node, "it repeats sorted tokens")
    outer = axis.entries.outer * expressions([times[dim]])[0]
    return TokenFlow(TokenAxis(dim, Entries(outer, axis.entries.inner)))


def _transpose(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    first, second = (dimension(arg, rank_of(operand)) for arg in node.args[1:3])
    return TokenFlow(axis.moved({first: second, second: first}.get(axis.token_dim, axis.token_dim)))


def _t(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    return TokenFlow(axis.moved(1 - axis.token_dim) if rank_of(operand) == 2 else axis)


def _permute(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    order = node.args[1]
    assert isinstance(order, Sequence)
    return TokenFlow(axis.moved([dimension(dim, rank_of(operand)) for dim in order].index(axis.token_dim)))


def _unsqueeze(node: Node, axes: Axes) -> TokenFlow:
    _, axis = single(node, axes)
    return TokenFlow(axis.moved(axis.token_dim + (dimension(node.args[1], rank_of(node)) <= axis.token_dim)))


def _squeeze(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    if len(node.args) < 2:
        raise lost(node, "it may drop any dimension of size 1")
    dims = node.args[1] if isinstance(node.args[1], Sequence) else [node.args[1]]
    squeezed = {dimension(dim, rank_of(operand)) for dim in dims}
    if axis.token_dim in squeezed:
        raise lost(node, "it drops the token axis")
    return TokenFlow(
        axis.moved(
            axis.token_dim - sum(dim < axis.token_dim and is_one(shape_of(operand)[dim]) for dim in squeezed)
        )
    )


def _slice(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    dim = dimension(node.args[1] if len(node.args) > 1 else 0, rank_of(operand))
    if dim == axis.token_dim and not is_full_slice(node):
        raise lost(node, "it selects some tokens")
    return TokenFlow(axis)


def _other_dim(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    if dimension(dim, rank_of(operand)) == axis.token_dim:
        raise lost(node, "it splits the token axis")
    return TokenFlow(axis)


def _select(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    dim = dimension(node.args[1], rank_of(operand))
    if dim == axis.token_dim:
        raise lost(node, "it selects a single token")
    return TokenFlow(axis.moved(axis.token_dim - (dim < axis.token_dim)))


def _unbind(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    dim = dimension(node.args[1] if len(node.args) > 1 else 0, rank_of(operand))
    if dim == axis.token_dim:
        raise lost(node, "it unbinds the token axis")
    return TokenFlow(axis.moved(axis.token_dim - (dim < axis.token_dim)))


def _index_select(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    if dimension(node.args[1], rank_of(operand)) == axis.token_dim:
        raise lost(node, "it selects some tokens")
    return TokenFlow(axis)


def _cat(node: Node, axes: Axes) -> TokenFlow:
    parts = node.args[0]
    assert isinstance(parts, Sequence)
    dim = dimension(node.args[1] if len(node.args) > 1 else 0, rank_of(node))
    flow = joined(node, [part for part in parts if isinstance(part, Node)], axes)
    if dim == flow.dim:
        raise lost(node, "it joins tensors along the token axis")
    return flow


def _stack(node: Node, axes: Axes) -> TokenFlow:
    parts = node.args[0]
    assert isinstance(parts, Sequence)
    dim = dimension(node.args[1] if len(node.args) > 1 else 0, rank_of(node))
    flow = joined(node, [part for part in parts if isinstance(part, Node)], axes)
    return TokenFlow(flow.axis.at(flow.dim + (dim <= flow.dim)), flow.gathers)


def _index_copy(node: Node, axes: Axes) -> TokenFlow:
    tensor, dim, index, source = node.args
    if index in axes or not isinstance(tensor, Node) or not isinstance(source, Node):
        raise lost(node, "its places depend on tokens")
    flow = joined(node, [tensor, source], axes)
    if dimension(dim, rank_of(node)) == flow.dim:
        raise lost(node, "it writes to places along the token axis")
    return flow


def joined(node: Node, parts: Sequence[Node], axes: Axes) -> TokenFlow:
    """Return the flow of a join of tensors with equal token axes; operands without one are gathered."""
    found = [with_token_dim(node, axes[part]) for part in parts if part in axes]
    if not found or any(
        axis.dim != found[0].dim or not axis.entries.same(found[0].entries) for axis in found
    ):
        raise lost(node, "it joins tensors along the token axis")
    axis = found[0]
    others = tuple((part, axis.token_dim) for part in parts if part not in axes)
    others = tuple((part, dim) for part, dim in others if not is_one(shape_of(part)[dim]))
    if others and not axis.entries.are_tokens:
        raise lost(node, f"{others[0][0].name} has other entries along the token axis")
    return TokenFlow(axis.at(axis.token_dim), others)


def _as_complex(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    if axis.token_dim == rank_of(operand) - 1:
        raise lost(node, "it pairs tokens up")
    return TokenFlow(axis.at(axis.token_dim))


LAYOUT_RULES: Mapping[Any, Rule] = MappingProxyType(
    {
        aten.view: _view,
        aten.reshape: _view,
        aten._unsafe_view: _view,
        aten.flatten: _flatten,
        aten.expand: _expand,
        aten.repeat: _repeat,
        aten.transpose: _transpose,
        aten.t: _t,
        aten.permute: _permute,
        aten.unsqueeze: _unsqueeze,
        aten.squeeze: _squeeze,
        aten.slice: _slice,
        aten.split: _other_dim,
        aten.split_with_sizes: _other_dim,
        aten.chunk: _other_dim,
        aten.unbind: _unbind,
        aten.select: _select,
        aten.index_select: _index_select,
        aten.index_copy: _index_copy,
        aten.cat: _cat,
        aten.stack: _stack,
        aten.view_as_complex: _as_complex,
        aten.view_as_real: like_first,
        aten.clone: same,
        aten.contiguous: same,
        aten._to_copy: same,
        aten.to: same,
        aten.detach: same,
        aten.alias: same,
        aten.dropout: same,
        aten.type_as: like_first,
        aten.zeros_like: like_first,
        aten.ones_like: like_first,
        aten.empty_like: like_first,
        aten.full_like: like_first,
    }
)
