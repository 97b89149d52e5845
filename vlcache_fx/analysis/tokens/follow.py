"""Follow the token axis through token-wise ATen operators.

``follow_tokens(node, axes)`` takes the token axes of a node's operands and returns a ``TokenFlow``: the token
axis of the result, the operands to gather when only some rows are computed, and the size argument that
contains the number of tokens. Operators that mix tokens, and unknown ones, are refused: restricting their
rows would change their results.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from vlcache_fx.analysis.tokens.axis import Axes, TokenFlow
from vlcache_fx.analysis.tokens.carry_rules import CARRY_RULES
from vlcache_fx.analysis.tokens.layout_rules import LAYOUT_RULES, same
from vlcache_fx.analysis.tokens.math_rules import MATH_RULES, pointwise
from vlcache_fx.analysis.tokens.routing_rules import rule_for, sorted_indices
from vlcache_fx.errors import Reason
from vlcache_fx.ir.refusal import refuse

aten = torch.ops.aten


def follow_tokens(node: Node, axes: Axes) -> TokenFlow:
    """Return the token flow of ``node``; ``axes`` has the token axes of its operands.

    Raises:
        UnsupportedGraphError: the operator mixes tokens, loses the token axis, or is unknown.
    """
    if node.op != "call_function":
        raise refuse(Reason.UNKNOWN_OP, node, f"a {node.op} node in the residual stream")
    if node.target is operator.getitem:
        return _getitem(node, axes)
    packet = getattr(node.target, "overloadpacket", None)
    rule = (
        rule_for(node, axes) or LAYOUT_RULES.get(packet) or MATH_RULES.get(packet) or CARRY_RULES.get(packet)
    )
    if rule is not None:
        return rule(node, axes)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return pointwise(node, axes)
    raise refuse(Reason.UNKNOWN_OP, node, f"{node.target} is not known to work token by token")


def _getitem(node: Node, axes: Axes) -> TokenFlow:
    source = node.args[0]
    packet = getattr(source.target, "overloadpacket", None) if isinstance(source, Node) else None
    if isinstance(source, Node) and packet is aten.sort and node.args[1] == 1:
        return TokenFlow(sorted_indices(source, axes))
    return same(node, axes)
