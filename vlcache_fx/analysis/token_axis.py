"""Follow the token axis through token-wise ATen ops.

``row_step(node, axes)`` says for one node, given the token axis of its operands, which axis of its result
runs over tokens, which other operands have a full token axis that meets it (and have to be gathered when only
some rows are computed), and which size argument spells out the number of tokens. An op that mixes tokens, or
that is not
known here, is refused: restricting its rows would change its result.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from vlcache_fx.analysis.refusal import refuse
from vlcache_fx.errors import Reason

aten = torch.ops.aten
NO_BOUND = 2**63 - 1


@dataclass(frozen=True)
class RowStep:
    """How one node treats rows.

    Attributes:
        axis: the dimension of the node's result that runs over tokens.
        gathers: ``(operand, dimension)`` of operands that are not computed from the rows but have a full
            token axis there.
        size_argument: ``(argument index, position)`` of the entry of a size list that is the number of
            tokens.
    """

    axis: int
    gathers: tuple[tuple[Node, int], ...] = ()
    size_argument: tuple[int, int] | None = None


Axes = Mapping[Node, int]


def shape_of(node: Node) -> torch.Size:
    """The shape of the node's (fake) tensor value."""
    shape: torch.Size = node.meta["val"].shape
    return shape


def row_step(node: Node, axes: Axes) -> RowStep:
    """The row treatment of ``node``, whose operands in ``axes`` have their token axis there.

    Raises:
        UnsupportedGraphError: the op mixes tokens, loses the token axis, or is unknown.
    """
    if node.op != "call_function":
        raise refuse(Reason.UNKNOWN_OP, node, f"a {node.op} node in the residual stream")
    if node.target in _FUNCTIONS:
        return _FUNCTIONS[node.target](node, axes)
    packet = getattr(node.target, "overloadpacket", None)
    if packet in _RULES:
        return _RULES[packet](node, axes)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise(node, axes)
    raise refuse(Reason.UNKNOWN_OP, node, f"{node.target} is not known to work token by token")


def is_one(size: Any) -> bool:
    """True where the size is the number 1 (a symbol is a length, never 1)."""
    return isinstance(size, int) and size == 1


def _lost(node: Node, why: str) -> Exception:
    return refuse(Reason.TOKEN_AXIS_LOST, node, why)


def _single(node: Node, axes: Axes) -> tuple[Node, int]:
    operand = node.args[0]
    if not isinstance(operand, Node) or operand not in axes:
        raise _lost(node, "its first operand is not part of the residual stream")
    others = [other for other in node.all_input_nodes if other is not operand and other in axes]
    if others:
        raise _lost(node, f"{others[0].name} brings a second token axis")
    return operand, axes[operand]


def _rank(node: Node) -> int:
    return len(shape_of(node))


def _dim(value: Any, rank: int) -> int:
    return int(value) % rank


def _pointwise(node: Node, axes: Axes) -> RowStep:
    rank = _rank(node)
    operands = [o for o in node.all_input_nodes if isinstance(o.meta.get("val"), torch.Tensor)]
    aligned = {rank - (_rank(o) - axes[o]) for o in operands if o in axes}
    if len(aligned) != 1:
        raise _lost(node, "its operands have their token axes at different places")
    axis = aligned.pop()
    gathers = []
    for operand in operands:
        own = axis - (rank - _rank(operand))
        if operand not in axes and own >= 0 and not is_one(shape_of(operand)[own]):
            gathers.append((operand, own))
    return RowStep(axis, tuple(gathers))


def _same(node: Node, axes: Axes) -> RowStep:
    return RowStep(_single(node, axes)[1])


def _linear(node: Node, axes: Axes) -> RowStep:
    operand, axis = _single(node, axes)
    if axis == _rank(operand) - 1:
        raise _lost(node, "it multiplies along the token axis")
    return RowStep(axis)


def _matmul(node: Node, axes: Axes) -> RowStep:
    operand, axis = _single(node, axes)
    if axis == _rank(operand) - 1:
        raise _lost(node, "it multiplies along the token axis")
    other = node.args[1]
    if not isinstance(other, Node) or _rank(other) > 2:
        raise _lost(node, "its second operand may differ from token to token")
    return RowStep(axis)


def _addmm(node: Node, axes: Axes) -> RowStep:
    bias, operand, weight = node.args[:3]
    if not isinstance(operand, Node) or axes.get(operand) != 0 or weight in axes or bias in axes:
        raise _lost(node, "only the first factor may be part of the residual stream")
    if isinstance(bias, Node) and _rank(bias) > 1 and not is_one(shape_of(bias)[0]):
        return RowStep(0, ((bias, 0),))
    return RowStep(0)


def _view(node: Node, axes: Axes) -> RowStep:
    operand, axis = _single(node, axes)
    before, after = shape_of(operand), shape_of(node)
    lead = _product(before[:axis])
    for place in range(len(after)):
        if sizes_equal(_product(after[:place]), lead) and sizes_equal(after[place], before[axis]):
            return RowStep(place, size_argument=(1, place))
    raise _lost(node, f"the view {tuple(before)} -> {tuple(after)} merges the token axis with another")


def _product(sizes: Sequence[Any]) -> Any:
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def sizes_equal(left: Any, right: Any) -> bool:
    """Equality as known from the expressions alone: no guard is added for it."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    expression = getattr(getattr(left, "node", None), "expr", left) - getattr(
        getattr(right, "node", None), "expr", right
    )
    return bool(expression == 0)


def _expand(node: Node, axes: Axes) -> RowStep:
    operand, axis = _single(node, axes)
    place = axis + _rank(node) - _rank(operand)
    return RowStep(place, size_argument=(1, place))


def _transpose(node: Node, axes: Axes) -> RowStep:
    operand, axis = _single(node, axes)
    first, second = (_dim(arg, _rank(operand)) for arg in node.args[1:3])
    return RowStep({first: second, second: first}.get(axis, axis))


def _t(node: Node, axes: Axes) -> RowStep:
    operand, axis = _single(node, axes)
    return RowStep(1 - axis if _rank(operand) == 2 else axis)


def _permute(node: Node, axes: Axes) -> RowStep:
    operand, axis = _single(node, axes)
    order = node.args[1]
    assert isinstance(order, Sequence)
    return RowStep([_dim(dim, _rank(operand)) for dim in order].index(axis))


def _unsqueeze(node: Node, axes: Axes) -> RowStep:
    _, axis = _single(node, axes)
    return RowStep(axis + (_dim(node.args[1], _rank(node)) <= axis))


def _squeeze(node: Node, axes: Axes) -> RowStep:
    operand, axis = _single(node, axes)
    if len(node.args) < 2:
        raise _lost(node, "it may drop any dimension of size 1")
    dims = node.args[1] if isinstance(node.args[1], Sequence) else [node.args[1]]
    own = {_dim(dim, _rank(operand)) for dim in dims}
    if axis in own:
        raise _lost(node, "it drops the token axis")
    return RowStep(axis - sum(dim < axis and is_one(shape_of(operand)[dim]) for dim in own))


def _slice(node: Node, axes: Axes) -> RowStep:
    operand, axis = _single(node, axes)
    dim = _dim(node.args[1] if len(node.args) > 1 else 0, _rank(operand))
    if dim == axis and not is_full_slice(node):
        raise _lost(node, "it takes a part of the tokens")
    return RowStep(axis)


def is_full_slice(node: Node) -> bool:
    """True for ``slice(x, dim, 0, end, 1)`` that keeps everything."""
    start, end, step = (list(node.args[2:]) + [None] * 3)[:3]
    return bool(start in (None, 0) and (end is None or end == NO_BOUND) and step in (None, 1))


def _other_dim(node: Node, axes: Axes) -> RowStep:
    operand, axis = _single(node, axes)
    place = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    if _dim(place, _rank(operand)) == axis:
        raise _lost(node, "it splits the token axis")
    return RowStep(axis)


def _select(node: Node, axes: Axes) -> RowStep:
    operand, axis = _single(node, axes)
    dim = _dim(node.args[1], _rank(operand))
    if dim == axis:
        raise _lost(node, "it takes a single token")
    return RowStep(axis - (dim < axis))


def _index_select(node: Node, axes: Axes) -> RowStep:
    operand, axis = _single(node, axes)
    if _dim(node.args[1], _rank(operand)) == axis:
        raise _lost(node, "it takes a part of the tokens")
    return RowStep(axis)


def _getitem(node: Node, axes: Axes) -> RowStep:
    return _same(node, axes)


def _cat(node: Node, axes: Axes) -> RowStep:
    parts = node.args[0]
    assert isinstance(parts, Sequence)
    rank = _rank(node)
    dim = _dim(node.args[1] if len(node.args) > 1 else 0, rank)
    tensors = [part for part in parts if isinstance(part, Node)]
    places = {axes[part] for part in tensors if part in axes}
    if len(places) != 1 or dim in places:
        raise _lost(node, "it joins tensors along the token axis")
    axis = places.pop()
    return RowStep(axis, tuple((part, axis) for part in tensors if part not in axes))


def _reduce(node: Node, axes: Axes) -> RowStep:
    operand, axis = _single(node, axes)
    rank = _rank(operand)
    dims = node.args[1] if len(node.args) > 1 else None
    if dims is None:
        raise _lost(node, "it reduces over every dimension")
    own = {_dim(dim, rank) for dim in (dims if isinstance(dims, Sequence) else [dims])}
    if axis in own or not own:
        raise _lost(node, "it reduces over the token axis")
    kept = _rank(node) == rank
    return RowStep(axis if kept else axis - sum(dim < axis for dim in own))


def _along(node: Node, axes: Axes) -> RowStep:
    operand, axis = _single(node, axes)
    if _dim(node.args[1], _rank(operand)) == axis:
        raise _lost(node, "it runs along the token axis")
    return RowStep(axis)


def _norm(node: Node, axes: Axes) -> RowStep:
    operand, axis = _single(node, axes)
    normalized = node.args[1]
    assert isinstance(normalized, Sequence)
    if axis >= _rank(operand) - len(normalized):
        raise _lost(node, "it normalises over the token axis")
    return RowStep(axis)


Rule = Callable[[Node, Axes], RowStep]

_RULES: Mapping[Any, Rule] = MappingProxyType(
    {
        aten.linear: _linear,
        aten.matmul: _matmul,
        aten.mm: _matmul,
        aten.addmm: _addmm,
        aten.view: _view,
        aten.reshape: _view,
        aten._unsafe_view: _view,
        aten.expand: _expand,
        aten.transpose: _transpose,
        aten.t: _t,
        aten.permute: _permute,
        aten.unsqueeze: _unsqueeze,
        aten.squeeze: _squeeze,
        aten.slice: _slice,
        aten.split: _other_dim,
        aten.split_with_sizes: _other_dim,
        aten.chunk: _other_dim,
        aten.select: _select,
        aten.index_select: _index_select,
        aten.cat: _cat,
        aten.mean: _reduce,
        aten.sum: _reduce,
        aten.amax: _reduce,
        aten.var: _reduce,
        aten.softmax: _along,
        aten._softmax: _along,
        aten.log_softmax: _along,
        aten.cumsum: _along,
        aten.layer_norm: _norm,
        aten.rms_norm: _norm,
        aten.clone: _same,
        aten.contiguous: _same,
        aten._to_copy: _same,
        aten.to: _same,
        aten.detach: _same,
        aten.alias: _same,
        aten.dropout: _same,
    }
)

_FUNCTIONS: Mapping[Any, Rule] = MappingProxyType({operator.getitem: _getitem})
