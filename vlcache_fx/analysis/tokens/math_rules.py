"""The token axis through operators that compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from vlcache_fx.analysis.tokens.axis import Axes, TokenAxis, TokenFlow, rank_of, shape_of
from vlcache_fx.analysis.tokens.layout_rules import Rule, dimension, lost, single, with_place
from vlcache_fx.ir.sizes import is_one

aten = torch.ops.aten


def pointwise(node: Node, axes: Axes) -> TokenFlow:
    """Values of one place alone; operands are broadcast against each other."""
    rank = rank_of(node)
    operands = [o for o in node.all_input_nodes if isinstance(o.meta.get("val"), torch.Tensor)]
    own = [(o, with_place(node, axes[o])) for o in operands if o in axes]
    places = {rank - (rank_of(o) - axis.place) for o, axis in own}
    if len(places) != 1 or any(not axis.entries.same(own[0][1].entries) for _, axis in own):
        raise lost(node, "its operands have their token axes at different places")
    place, entries = places.pop(), own[0][1].entries
    gathers = []
    for operand in operands:
        dim = place - (rank - rank_of(operand))
        if operand not in axes and dim >= 0 and not is_one(shape_of(operand)[dim]):
            gathers.append((operand, dim))
    if gathers and not entries.are_tokens:
        raise lost(node, f"{gathers[0][0].name} has other entries along the token axis")
    return TokenFlow(TokenAxis(place, entries), tuple(gathers))


def _linear(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    if axis.place == rank_of(operand) - 1:
        raise lost(node, "it multiplies along the token axis")
    return TokenFlow(axis.at(axis.place))


def _matmul(node: Node, axes: Axes) -> TokenFlow:
    operand, other = node.args[:2]
    if not isinstance(operand, Node) or operand not in axes:
        raise lost(node, "its first operand is not part of the residual stream")
    axis = with_place(node, axes[operand])
    from_end = rank_of(operand) - axis.place
    if from_end == 1:
        raise lost(node, "it multiplies along the token axis")
    if not isinstance(other, Node):
        raise lost(node, "its second operand is no tensor")
    place = rank_of(node) - from_end
    if other in axes:  # a matrix per token on both sides
        second = with_place(node, axes[other])
        if rank_of(other) - second.place != from_end or from_end < 3:
            raise lost(node, f"{other.name} brings a second token axis")
        if not second.entries.same(axis.entries):
            raise lost(node, "its operands have their token axes at different places")
    elif from_end > 2 and rank_of(other) >= from_end and not is_one(shape_of(other)[-from_end]):
        raise lost(node, "its second operand may differ from token to token")
    return TokenFlow(axis.at(place))


def _addmm(node: Node, axes: Axes) -> TokenFlow:
    bias, operand, weight = node.args[:3]
    axis = axes.get(operand) if isinstance(operand, Node) else None
    if axis is None or axis.dim != 0 or weight in axes or bias in axes:
        raise lost(node, "only the first factor may be part of the residual stream")
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
    own = {dimension(dim, rank) for dim in (dims if isinstance(dims, Sequence) else [dims])}
    if axis.place in own or not own:
        raise lost(node, "it reduces over the token axis")
    value = node.meta["val"]
    first = value[0] if isinstance(value, tuple | list) else value
    kept = first.dim() == rank
    return TokenFlow(axis.at(axis.place if kept else axis.place - sum(dim < axis.place for dim in own)))


def _convolution(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    if axis.place != 0 or rank_of(operand) < 3:
        raise lost(node, "it mixes neighbouring tokens")
    return TokenFlow(axis.at(0))


def _along(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    dim = node.args[1] if len(node.args) > 1 else -1
    if dimension(dim, rank_of(operand)) == axis.place:
        raise lost(node, "it runs along the token axis")
    return TokenFlow(axis.at(axis.place))


def _top(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", -1)
    if dimension(dim, rank_of(operand)) == axis.place:
        raise lost(node, "it compares tokens")
    return TokenFlow(axis.at(axis.place))


def _norm(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    normalized = node.args[1]
    assert isinstance(normalized, Sequence)
    if axis.place >= rank_of(operand) - len(normalized):
        raise lost(node, "it normalises over the token axis")
    return TokenFlow(axis.at(axis.place))


def _at_places(node: Node, axes: Axes) -> TokenFlow:
    """``gather`` and ``scatter``: along another dimension, at places that each token names for itself."""
    dim = dimension(node.args[1], rank_of(node))
    tensors = [o for o in node.all_input_nodes if isinstance(o.meta.get("val"), torch.Tensor)]
    own = [with_place(node, axes[o]) for o in tensors if o in axes]
    if any(axis.dim != own[0].dim or not axis.entries.same(own[0].entries) for axis in own):
        raise lost(node, "its operands have their token axes at different places")
    if dim == own[0].dim:
        raise lost(node, "it takes values of other tokens")
    others = tuple((o, own[0].place) for o in tensors if o not in axes)
    if others and not own[0].entries.are_tokens:
        raise lost(node, f"{others[0][0].name} has other entries along the token axis")
    return TokenFlow(own[0].at(own[0].place), others)


MATH_RULES: Mapping[Any, Rule] = MappingProxyType(
    {
        aten.linear: _linear,
        aten.matmul: _matmul,
        aten.mm: _matmul,
        aten.bmm: _matmul,
        aten.addmm: _addmm,
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
        aten.gather: _at_places,
        aten.scatter: _at_places,
        aten.scatter_add: _at_places,
    }
)
