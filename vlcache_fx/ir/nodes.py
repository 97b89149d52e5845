"""Facts about single nodes, and sets of operators that several analyses share."""

from operator import attrgetter
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from vlcache_fx.ir.sizes import equal, expression

aten = torch.ops.aten

NO_BOUND = 2**63 - 1
"""The end of a slice without an end."""

COPIES = frozenset({aten.clone, aten.contiguous, aten.detach, aten.alias, aten.lift_fresh_copy})
"""The same values in the same shape and dtype."""

CASTS = frozenset({aten.to, aten._to_copy, aten.type_as})
"""The same values in another dtype or on another device."""

RESHAPES = frozenset(
    {aten.view, aten.reshape, aten._unsafe_view, aten.unsqueeze, aten.squeeze, aten.flatten, aten.unflatten}
)
"""The same values in the same order, in another shape."""

PERMUTES = frozenset({aten.transpose, aten.permute, aten.t, aten.numpy_T, aten.movedim, aten.swapaxes})
"""The same values with their dimensions in another order."""

VIEWS = RESHAPES | PERMUTES | {aten.expand}
"""The same values, each at least once, in another shape."""

LAYOUT = COPIES | VIEWS | {aten.slice}
"""Operators that move, repeat or drop values and compute none."""


def packet_of(node: Node) -> object:
    """Return the overload packet of the node's target (``aten.view`` for ``aten.view.default``)."""
    return getattr(node.target, "overloadpacket", node.target)


def attribute(module: fx.GraphModule, node: Node) -> Any:
    """Return the tensor or module that a ``get_attr`` node of ``module`` reads.

    Raises:
        AttributeError: ``module`` has no such attribute.
    """
    return attrgetter(str(node.target))(module)


def slice_bounds(node: Node) -> tuple[Any, Any, Any, Any]:
    """Return ``(dim, start, end, step)`` of a ``slice`` or ``slice_scatter``, defaults included."""
    first = 1 if packet_of(node) is aten.slice else 2
    arguments: list[Any] = list(node.args[first:])
    dim, start, end, step = arguments + [0, None, None, 1][len(arguments) :]
    return dim, start, end, step


def keeps_last(node: Node, size: Any) -> bool:
    """Return True for a ``slice`` of the last ``size`` entries of a dimension, as in ``x[..., -tokens:]``."""
    dim, start, end, step = slice_bounds(node)
    if step not in (None, 1) or end not in (None, NO_BOUND):
        return False
    source: Any = node.args[0]
    first = expression(start.meta["val"] if isinstance(start, Node) else start or 0)
    kept = expression(size)
    return equal(first, -kept) or equal(first + kept, source.meta["val"].shape[dim])


def is_full_slice(node: Node) -> bool:
    """Return True for a ``slice`` or ``slice_scatter`` over the whole dimension."""
    _, start, end, step = slice_bounds(node)
    return start in (None, 0) and end in (None, NO_BOUND) and step in (None, 1)
