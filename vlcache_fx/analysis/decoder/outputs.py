"""Rows of the last layer that the graph's results need."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from vlcache_fx.analysis.tokens.axis import Axes, TokenAxis, TokenFlow, shape_of
from vlcache_fx.analysis.tokens.follow import follow_tokens
from vlcache_fx.errors import UnsupportedGraphError
from vlcache_fx.ir.dataflow import data_users
from vlcache_fx.ir.nodes import CASTS, COPIES, is_full_slice, packet_of
from vlcache_fx.plan.selection import Bound, InputPositions, InputSize, RowSelection, SizeSum

aten = torch.ops.aten


@dataclass(frozen=True)
class TailRows:
    """Rows of the last boundary that results depend on.

    Attributes:
        selection: the node that selects some tokens (``hidden[:, -1:]``); None if all are needed.
        axis: token dimension of the selection's operand.
        flows: token flow of the tail nodes up to the selection.
        rule: the selection as plain data; None if all rows are needed.
    """

    selection: Node | None
    axis: int
    flows: dict[Node, TokenFlow]
    rule: RowSelection | None = None

    @property
    def num_taken(self) -> int | torch.SymInt:
        """Number of selected tokens; symbolic if calls differ in it."""
        assert self.selection is not None
        shape = shape_of(self.selection)
        taken: int | torch.SymInt = 1 if packet_of(self.selection) is aten.select else shape[self.axis]
        return taken

    @property
    def varies(self) -> bool:
        """True if calls may differ in the number of selected tokens."""
        return self.selection is not None and not isinstance(self.num_taken, int)

    def positions(self, num_tokens: int, args: Sequence[Any] = ()) -> Tensor | None:
        """Return the positions that results need, int64 [n], or None for all; see ``RowSelection``."""
        return None if self.rule is None else self.rule.positions(num_tokens, args)


def find_tail_rows(boundary: Node, tail: tuple[Node, ...], axis: int) -> TailRows:
    """Follow the tail token by token up to a selection of rows that all results depend on.

    The selection is constant or given by inputs of the graph: bounds are sums of sizes, or positions are an
    input. Without such a selection, all rows are needed.
    """
    axes = {boundary: TokenAxis(axis)}
    flows: dict[Node, TokenFlow] = {}
    for node in tail:
        rule = _selection(node, axes)
        if rule is not None:
            if all(
                user is node or user in flows for source in axes for user in data_users(source)
            ) and not any(_is_result(source) for source in axes):
                return TailRows(node, axes[node.args[0]].token_dim, flows, rule)  # type: ignore[index]
            break
        try:
            flow = follow_tokens(node, axes)
        except UnsupportedGraphError:
            break
        axes[node] = flow.axis
        flows[node] = flow
    return TailRows(None, axis, {})


def _is_result(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _selection(node: Node, axes: Axes) -> RowSelection | None:
    """Return a node's selection of tokens; None for other nodes, and if inputs do not determine it."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or source not in axes or not axes[source].entries.are_tokens:
        return None
    packet = packet_of(node)
    if packet in (aten.index, aten.index_select):
        return _by_positions(node, source, axes)
    if packet not in (aten.slice, aten.select) or (packet is aten.slice and is_full_slice(node)):
        return None
    if not _is_token_dim(node.args[1] if len(node.args) > 1 else 0, source, axes):
        return None
    bounds = tuple(_bound(arg) for arg in node.args[2:])
    if any(isinstance(bound, _Unknown) for bound in bounds):
        return None
    if packet is aten.slice:
        bounds = tuple((list(bounds) + [None] * 3)[:3])
    return RowSelection(bounds)  # type: ignore[arg-type]


def _is_token_dim(dim: Any, source: Node, axes: Axes) -> bool:
    return isinstance(dim, int) and dim % len(shape_of(source)) == axes[source].dim


def _by_positions(node: Node, source: Node, axes: Axes) -> RowSelection | None:
    """``hidden[:, positions]`` with an input as positions, the same for all samples."""
    if packet_of(node) is aten.index_select:
        dim, index = node.args[1:3]
    else:
        indices = node.args[1]
        assert isinstance(indices, list | tuple)
        used = [(dim, index) for dim, index in enumerate(indices) if index is not None]
        if len(used) != 1:
            return None
        dim, index = used[0]
    if not isinstance(index, Node) or not _is_token_dim(dim, source, axes):
        return None
    if not _is_position_list(index):  # a bool mask is another kind of selection
        return None
    while packet_of(index) in COPIES | CASTS and isinstance(index.args[0], Node):
        index = index.args[0]
    if index.op != "placeholder" or not _is_position_list(index):
        return None
    number = node.graph.find_nodes(op="placeholder").index(index)
    return RowSelection((InputPositions(number, from_end=packet_of(node) is aten.index),))


def _is_position_list(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 1 and value.dtype in (torch.int32, torch.int64)


class _Unknown:
    """A bound that inputs do not determine."""


def _bound(arg: Any) -> Bound | _Unknown:
    """Return a bound of a slice as plain data."""
    if arg is None or isinstance(arg, int):
        return arg
    value = arg.meta.get("val") if isinstance(arg, Node) else None
    if isinstance(value, int):
        return value
    if not isinstance(value, torch.SymInt):
        return _Unknown()
    sizes = _sizes_of(arg.graph)
    constant, terms = 0, []
    for term in sympy.Add.make_args(value.node.expr):
        factor, symbol = term.as_coeff_Mul()
        if not factor.is_Integer:
            return _Unknown()
        if symbol == 1:
            constant += int(factor)
        elif str(symbol) in sizes:
            terms.append(InputSize(int(factor), *sizes[str(symbol)]))
        else:
            return _Unknown()
    return SizeSum(constant, tuple(terms)) if terms else constant


def _sizes_of(graph: torch.fx.Graph) -> dict[str, tuple[int, int | None]]:
    """Return the input of each symbol: its index, and the dimension of this size; None for a number."""
    found: dict[str, tuple[int, int | None]] = {}
    for index, node in enumerate(graph.find_nodes(op="placeholder")):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
            found[str(value.node.expr)] = (index, None)
        for dim, size in enumerate(getattr(value, "shape", ())):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found.setdefault(str(size.node.expr), (index, dim))
    return found
