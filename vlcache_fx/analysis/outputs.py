"""Which rows the graph's results need after the last layer."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from vlcache_fx.analysis.axis import Axes, RowStep, TokenAxis, shape_of
from vlcache_fx.analysis.dataflow import data_users
from vlcache_fx.analysis.frontier import packet_of
from vlcache_fx.analysis.layout_rules import is_full_slice
from vlcache_fx.analysis.token_axis import row_step
from vlcache_fx.errors import UnsupportedGraphError
from vlcache_fx.plan.selection import RowSelection

aten = torch.ops.aten


@dataclass(frozen=True)
class TailRows:
    """The rows of the last boundary that results depend on.

    Attributes:
        selection: the node that takes some tokens (``hidden[:, -1:]``), or None where all are needed.
        axis: the token axis of the selection's operand.
        steps: row treatment of the tail nodes up to the selection.
    """

    selection: Node | None
    axis: int
    steps: dict[Node, RowStep]

    @property
    def rule(self) -> RowSelection | None:
        """The selection as plain data; None where all rows are needed."""
        if self.selection is None:
            return None
        bounds = self.selection.args[2:]
        if packet_of(self.selection) is not aten.select:
            bounds = tuple((list(bounds) + [None] * 3)[:3])
        return RowSelection(bounds)  # type: ignore[arg-type]

    def positions(self, num_tokens: int) -> Tensor | None:
        """Absolute positions that results need, int64 [n], or None for all."""
        return None if self.rule is None else self.rule.positions(num_tokens)


def find_tail_rows(boundary: Node, tail: tuple[Node, ...], axis: int) -> TailRows:
    """Follow the tail token by token up to one selection of rows that everything goes through.

    Its bounds are constant; where there is none such, all rows are needed.
    """
    axes = {boundary: TokenAxis(axis)}
    steps: dict[Node, RowStep] = {}
    for node in tail:
        if _selects(node, axes):
            if all(
                user is node or user in steps for source in axes for user in data_users(source)
            ) and not any(_is_result(source) for source in axes):
                return TailRows(node, axes[node.args[0]].place, steps)  # type: ignore[index]
            break
        try:
            step = row_step(node, axes)
        except UnsupportedGraphError:
            break
        axes[node] = step.axis
        steps[node] = step
    return TailRows(None, axis, {})


def _is_result(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _selects(node: Node, axes: Axes) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or source not in axes or packet_of(node) not in (aten.slice, aten.select):
        return False
    if (packet_of(node) is aten.slice and is_full_slice(node)) or not axes[source].entries.are_tokens:
        return False
    constant = all(arg is None or isinstance(arg, int) for arg in node.args[1:])
    dim = node.args[1] if len(node.args) > 1 else 0
    return constant and isinstance(dim, int) and dim % len(shape_of(source)) == axes[source].dim
