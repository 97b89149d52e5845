"""Functional writes to a part of a tensor: recognised, and brought to canonical form."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from vlcache_fx.ir.nodes import NO_BOUND, is_full_slice, slice_bounds

aten = torch.ops.aten


def scattered_rows(node: Node) -> tuple[Node, int, Node] | None:
    """Return ``(rows, dim, positions)`` of a node that replaces rows of its first operand; None for others.

    ``positions`` are int64 [rows], along dimension ``dim`` of the node.
    """
    if node.target is aten.index_copy.default:
        _, dim, positions, source = node.args
    elif node.target is aten.index_put.default and not any(node.args[3:]):
        indices, source = node.args[1:3]
        assert isinstance(indices, Sequence)
        dim, positions = len(indices) - 1, indices[-1]
        if any(other is not None for other in indices[:-1]):
            return None
    else:
        return None
    assert isinstance(dim, int)
    if not isinstance(positions, Node) or not isinstance(source, Node):
        return None
    rows, whole = source.meta["val"], node.meta["val"]
    if positions.meta["val"].dim() != 1 or positions.meta["val"].dtype != torch.int64:
        return None
    dim %= whole.dim()
    missing = ["1"] * (whole.dim() - rows.dim())  # leading dimensions of size 1 may be left out
    sizes = [*missing, *map(str, rows.shape)]
    same = [
        str(size) == own or at == dim for at, (size, own) in enumerate(zip(whole.shape, sizes, strict=True))
    ]
    return (source, dim, positions) if all(same) else None  # else the source is broadcast


def canonicalize_slice_scatters(graph: fx.Graph) -> None:
    """Replace ``slice_scatter`` by ``index_copy``, and drop copies and full slices around it.

    Functionalisation writes ``x[:, a:b] = y`` as slices, a copy and one ``slice_scatter`` per dimension.
    """
    if not any(node.target in (aten.slice_scatter.default, aten.copy.default) for node in graph.nodes):
        return
    for node in list(graph.nodes):
        replacement = None
        if node.target is aten.slice.Tensor and is_full_slice(node):
            replacement = node.args[0]
        elif node.target is aten.slice_scatter.default:
            replacement = node.args[1] if is_full_slice(node) else _as_index_copy(graph, node)
        elif node.target is aten.copy.default and node.args[0].op != "placeholder":
            old, new = (argument.meta["val"] for argument in node.args[:2])
            same = (old.dtype, old.device, str(old.shape)) == (new.dtype, new.device, str(new.shape))
            replacement = node.args[1] if same else None
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)


def _as_index_copy(graph: fx.Graph, node: Node) -> Node | None:
    """Return ``slice_scatter`` as ``index_copy``; None where that is not possible.

    Positions are computed from the slice and the target's size, not from the source: its size is known only
    once it is computed.
    """
    target, source = node.args[:2]
    dim, start, end, step = slice_bounds(node)
    assert isinstance(source, Node)
    if step != 1:
        return None
    value, whole = source.meta["val"], node.meta["val"]
    dim %= value.dim()

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        result = graph.call_function(target, args, kwargs)
        args = fx.map_arg(args, lambda argument: argument.meta["val"])
        result.meta["val"] = target(*args, **kwargs)
        return result

    with graph.inserting_before(node), value.fake_mode:
        size: Any = (
            whole.shape[dim] if isinstance(whole.shape[dim], int) else call(aten.sym_size.int, target, dim)
        )
        first = 0 if start is None else _from_front(call, start, size)
        after = size if end in (None, NO_BOUND) else _from_front(call, end, size)
        count = _difference(call, after, first)
        if str(_value_of(count)) != str(value.shape[dim]):
            return None  # the slice is clamped to its tensor, or its length is unknown
        positions = call(aten.arange.default, count, device=value.device)
        if first != 0:
            positions = call(aten.add.Tensor, positions, first)
        result = graph.call_function(aten.index_copy.default, (target, dim, positions, source))
    result.meta.update(node.meta, val=whole)
    return result


def _from_front(call: Any, bound: Any, size: Any) -> Any:
    negative = isinstance(bound, int) and bound < 0
    return _difference(call, size, -bound) if negative else bound


def _difference(call: Any, left: Any, right: Any) -> Any:
    if right == 0 or (isinstance(left, int) and isinstance(right, int)):
        return left - right if right != 0 else left
    return call(operator.sub, left, right)


def _value_of(size: Any) -> Any:
    return size.meta["val"] if isinstance(size, Node) else size
