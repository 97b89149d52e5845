"""Follow the token axis through token-wise ATen ops.

``row_step(node, axes)`` says for one node, given the token axes of its operands, where its result runs over
tokens, which other operands have a full token axis that meets it (and have to be gathered when only some rows
are computed), and which size argument spells out the number of tokens. An op that mixes tokens, or that is
not known here, is refused: restricting its rows would change its result.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from vlcache_fx.analysis.tokens.axis import Axes, RowStep
from vlcache_fx.analysis.tokens.layout_rules import LAYOUT_RULES, same
from vlcache_fx.analysis.tokens.math_rules import MATH_RULES, pointwise
from vlcache_fx.analysis.tokens.routing_rules import rule_for, sorted_places
from vlcache_fx.errors import Reason
from vlcache_fx.ir.refusal import refuse

aten = torch.ops.aten


def row_step(node: Node, axes: Axes) -> RowStep:
    """The row treatment of ``node``, whose operands in ``axes`` have their token axis there.

    Raises:
        UnsupportedGraphError: the op mixes tokens, loses the token axis, or is unknown.
    """
    if node.op != "call_function":
        raise refuse(Reason.UNKNOWN_OP, node, f"a {node.op} node in the residual stream")
    if node.target is operator.getitem:
        return _getitem(node, axes)
    packet = getattr(node.target, "overloadpacket", None)
    rule = rule_for(node, axes) or LAYOUT_RULES.get(packet) or MATH_RULES.get(packet)
    if rule is not None:
        return rule(node, axes)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return pointwise(node, axes)
    raise refuse(Reason.UNKNOWN_OP, node, f"{node.target} is not known to work token by token")


def _getitem(node: Node, axes: Axes) -> RowStep:
    source = node.args[0]
    packet = getattr(source.target, "overloadpacket", None) if isinstance(source, Node) else None
    if isinstance(source, Node) and packet is aten.sort and node.args[1] == 1:
        return RowStep(sorted_places(source, axes))
    return same(node, axes)
