"""Replace convolutions over earlier tokens by one operator."""

from typing import Any, ClassVar

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

import vlcache_fx.ops  # noqa: F401  (defines torch.ops.vlcache)
from vlcache_fx.ir.nodes import CASTS, keeps_last, packet_of, slice_bounds
from vlcache_fx.ir.sizes import equal
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.utility.insert import insert_call

aten = torch.ops.aten
CONV = torch.ops.vlcache.causal_conv1d.default


class CanonicaliseConvolutions(Pass):
    """A depthwise ``conv1d`` that sees its own and earlier tokens becomes ``vlcache.causal_conv1d``.

    Models pad on both sides and slice the end off, or pad on the left alone. With a cache, they put the
    values of earlier tokens in front and slice the result::

        conv1d(x, w, padding=K - 1)[..., :T]            conv1d(pad(x, (K - 1, 0)), w)
        act(conv1d(cat([s, x]), w, padding=K - 1)[..., :S + T])[..., -T:]
    """

    name: ClassVar[str] = "canonicalise_convolutions"

    def run(self, program: Program) -> bool:
        """Rewrite each such convolution."""
        changed = False
        for node in list(program.graph.nodes):
            if node.op == "call_function" and node.target is aten.conv1d.default:
                changed |= _rewrite(program, node)
        for node in list(program.graph.nodes):
            if node.op == "call_function" and node.target is CONV:
                changed |= _split_past(program, node)
        return changed


def _rewrite(program: Program, node: Node) -> bool:
    arguments: list[Any] = list(node.args)
    arguments += [None, [1], [0], [1], 1][len(arguments) - 2 :]
    x, weight, bias, stride, padding, dilation, groups = arguments
    shape, kernel = x.meta["val"].shape, weight.meta["val"].shape
    is_depthwise = len(shape) == 3 and equal(shape[1], groups) and equal(kernel[0], groups) and kernel[1] == 1
    if not is_depthwise or [*stride] != [1] or [*dilation] != [1] or not isinstance(kernel[2], int):
        return False
    if [*padding] == [kernel[2] - 1]:
        ends = [user for user in node.users if _keeps_first(user, shape[-1])]
        if not ends or len(ends) < len(node.users):
            return False
    elif [*padding] == [0] and _pads_left(x, kernel[2] - 1):
        x, ends = x.args[0], [node]
    else:
        return False
    with program.graph.inserting_after(node):
        made = insert_call(program.graph, CONV, x, weight, bias, origin=node)
    for end in ends:
        end.replace_all_uses_with(made)
        program.graph.erase_node(end)
    if node not in ends:
        program.graph.erase_node(node)
    return True


def _keeps_first(node: Node, size: Any) -> bool:
    """Return True for a slice of the first ``size`` entries of the last dimension."""
    if node.target is not aten.slice.Tensor:
        return False
    dim, start, _, step = slice_bounds(node)
    value = node.meta["val"]
    return dim in (-1, value.dim() - 1) and start in (None, 0) and step == 1 and equal(value.shape[-1], size)


def _pads_left(node: Node, count: int) -> bool:
    if node.target not in (aten.constant_pad_nd.default, aten.pad.default):
        return False
    sizes: Any = node.args[1]
    others = [argument for argument in node.args[2:] if argument not in ("constant", None, 0)]
    return [*sizes] == [count, 0] and not others


def _split_past(program: Program, node: Node) -> bool:
    """Pass the values of earlier tokens on their own, where the results of these are sliced off."""
    joined = node.args[0]
    if not isinstance(joined, Node) or joined.target is not aten.cat.default or len(node.args) > 3:
        return False
    parts: Any = joined.args[0]
    dim: Any = joined.args[1] if len(joined.args) > 1 else 0
    if len(parts) != 2 or dim not in (-1, joined.meta["val"].dim() - 1):
        return False
    past, x = parts
    chain, end = [], node
    while end.target is not aten.slice.Tensor:
        if len(end.users) != 1:
            return False
        (end,) = end.users
        if end.target is not aten.slice.Tensor and not _is_unary(end):
            return False
        chain.append(end)
    is_last_dim = slice_bounds(end)[0] in (-1, end.meta["val"].dim() - 1)
    if not is_last_dim or not keeps_last(end, x.meta["val"].shape[-1]):
        return False
    with program.graph.inserting_after(node):
        bias = node.args[2] if len(node.args) > 2 else None
        made = insert_call(program.graph, CONV, x, node.args[1], bias, past, origin=node)
    for step in chain[:-1]:
        with program.graph.inserting_after(step):
            others = step.args[1:]
            made = insert_call(program.graph, step.target, made, *others, origin=step, **step.kwargs)
    end.replace_all_uses_with(made)
    for step in (*reversed(chain), node):
        program.graph.erase_node(step)
    return True


def _is_unary(node: Node) -> bool:
    """Return True for a pointwise operator of one tensor, its first argument."""
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) or packet_of(node) in CASTS
    operands = [argument for argument in tree_leaves((node.args, node.kwargs)) if isinstance(argument, Node)]
    return is_pointwise and operands == [node.args[0]]
