"""The token axis through operators that compute new values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from vlcache_fx.analysis.tokens.axis import Axes, TokenAxis, TokenFlow, rank_of, shape_of
from vlcache_fx.analysis.tokens.layout_rules import Rule, dimension, lost, single, with_token_dim
from vlcache_fx.ir.sizes import is_one

aten = torch.ops.aten


def pointwise(node: Node, axes: Axes) -> TokenFlow:
    """Return the flow of an elementwise operator with broadcasting."""
    rank = rank_of(node)
    operands = [o for o in node.all_input_nodes if isinstance(o.meta.get("val"), torch.Tensor)]
    token_axes = [(o, with_token_dim(node, axes[o])) for o in operands if o in axes]
    dims = {rank - (rank_of(o) - axis.token_dim) for o, axis in token_axes}
    if len(dims) != 1 or any(not axis.entries.same(token_axes[0][1].entries) for _, axis in token_axes):
        raise lost(node, "the token axes of its operands do not match")
    token_dim, entries = dims.pop(), token_axes[0][1].entries
    gathers = []
    for operand in operands:
        dim = token_dim - (rank - rank_of(operand))
        if operand not in axes and dim >= 0 and not is_one(shape_of(operand)[dim]):
            gathers.append((operand, dim))
    if gathers and not entries.are_tokens:
        raise lost(node, f"{gathers[0][0].name} has other entries along the token axis")
    return TokenFlow(TokenAxis(token_dim, entries), tuple(gathers))


def _linear(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    if axis.token_dim == rank_of(operand) - 1:
        raise lost(node, "it multiplies along the token axis")
    return TokenFlow(axis.at(axis.token_dim))


def _matmul(node: Node, axes: Axes) -> TokenFlow:
    operand, other = node.args[:2]
    if not isinstance(operand, Node) or operand not in axes:
        raise lost(node, "its first operand is not part of the residual stream")
    axis = with_token_dim(node, axes[operand])
    from_end = rank_of(operand) - axis.token_dim
    if from_end == 1:
        raise lost(node, "it multiplies along the token axis")
    if not isinstance(other, Node):
        raise lost(node, "its second operand is not a tensor")
    dim = rank_of(node) - from_end
    if other in axes:  # a matrix per token on both sides
        second = with_token_dim(node, axes[other])
        if rank_of(other) - second.token_dim != from_end or from_end < 3:
            raise lost(node, f"{other.name} has a second token axis")
        if not second.entries.same(axis.entries):
            raise lost(node, "the token axes of its operands do not match")
    elif from_end > 2 and rank_of(other) >= from_end and not is_one(shape_of(other)[-from_end]):
        raise lost(node, "its second operand may differ from token to token")
    return TokenFlow(axis.at(dim))


def _packed(node: Node, axes: Axes) -> TokenFlow:
    """A product of rows with a weight that a kernel has packed: integers, and their scales."""
    operand, *others = node.args
    return TokenFlow(_first_factor(node, axes, operand, others).at(0))


def _first_factor(node: Node, axes: Axes, operand: object, others: Sequence[object]) -> TokenAxis:
    """Return the axis of the matrix with a row per token, which must be the only one."""
    axis = axes.get(operand) if isinstance(operand, Node) else None
    if axis is None or axis.dim != 0 or any(isinstance(other, Node) and other in axes for other in others):
        raise lost(node, "only the first factor may be part of the residual stream")
    return axis


def _addmm(node: Node, axes: Axes) -> TokenFlow:
    bias, operand, weight = node.args[:3]
    axis = _first_factor(node, axes, operand, (bias, weight))
    if isinstance(bias, Node) and rank_of(bias) > 1 and not is_one(shape_of(bias)[0]):
        if not axis.entries.are_tokens:
            raise lost(node, f"{bias.name} has other entries along the token axis")
        return TokenFlow(axis.at(0), ((bias, 0),))
    return TokenFlow(axis.at(0))


def _reduce(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    rank = rank_of(operand)
    dims = node.args[1] if len(node.args) > 1 else None
    if dims is None:
        raise lost(node, "it reduces over every dimension")
    reduced = {dimension(dim, rank) for dim in (dims if isinstance(dims, Sequence) else [dims])}
    if axis.token_dim in reduced or not reduced:
        raise lost(node, "it reduces over the token axis")
    value = node.meta["val"]
    first = value[0] if isinstance(value, tuple | list) else value
    kept = first.dim() == rank
    return TokenFlow(
        axis.at(axis.token_dim if kept else axis.token_dim - sum(dim < axis.token_dim for dim in reduced))
    )


def _convolution(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    if axis.token_dim != 0 or rank_of(operand) < 3:
        raise lost(node, "it convolves over tokens")
    return TokenFlow(axis.at(0))


def _along(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    dim = node.args[1] if len(node.args) > 1 else -1
    if dimension(dim, rank_of(operand)) == axis.token_dim:
        raise lost(node, "it runs along the token axis")
    return TokenFlow(axis.at(axis.token_dim))


def _top(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", -1)
    if dimension(dim, rank_of(operand)) == axis.token_dim:
        raise lost(node, "it compares tokens")
    return TokenFlow(axis.at(axis.token_dim))


def _norm(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    normalized = node.args[1]
    assert isinstance(normalized, Sequence)
    if axis.token_dim >= rank_of(operand) - len(normalized):
        raise lost(node, "it normalises over the token axis")
    return TokenFlow(axis.at(axis.token_dim))


def _gather(node: Node, axes: Axes) -> TokenFlow:
    """``gather`` and ``scatter`` along another dimension, at indices of each token's own."""
    dim = dimension(node.args[1], rank_of(node))
    tensors = [o for o in node.all_input_nodes if isinstance(o.meta.get("val"), torch.Tensor)]
    first, *rest = (with_token_dim(node, axes[o]) for o in tensors if o in axes)
    if any(axis.dim != first.dim or not axis.entries.same(first.entries) for axis in rest):
        raise lost(node, "the token axes of its operands do not match")
    if dim == first.dim:
        raise lost(node, "it reads values of other tokens")
    others = tuple((o, first.token_dim) for o in tensors if o not in axes)
    if others and not first.entries.are_tokens:
        raise lost(node, f"{others[0][0].name} has other entries along the token axis")
    return TokenFlow(first.at(first.token_dim), others)


MATH_RULES: Mapping[Any, Rule] = MappingProxyType(
    {
        aten.linear: _linear,
        aten.matmul: _matmul,
        aten.mm: _matmul,
        aten.bmm: _matmul,
        aten.addmm: _addmm,
        aten._int_mm: _packed,
        aten._weight_int4pack_mm: _packed,
        aten._weight_int4pack_mm_for_cpu: _packed,
        aten._weight_int8pack_mm: _packed,
        aten.mean: _reduce,
        aten.sum: _reduce,
        aten.amax: _reduce,
        aten.amin: _reduce,
        aten.any: _reduce,
        aten.prod: _reduce,
        aten.max: _reduce,
        aten.argmax: _reduce,
        aten.var: _reduce,
        aten.std: _reduce,
        aten.logsumexp: _reduce,
        aten.conv1d: _convolution,
        aten.conv2d: _convolution,
        aten.conv3d: _convolution,
        aten.convolution: _convolution,
        aten.softmax: _along,
        aten._softmax: _along,
        aten.log_softmax: _along,
        aten._log_softmax: _along,
        aten.cumsum: _along,
        aten.topk: _top,
        aten.layer_norm: _norm,
        aten.rms_norm: _norm,
        aten.gather: _gather,
        aten.scatter: _gather,
        aten.scatter_add: _gather,
    }
)
