"""The token axis through operators that carry a state from token to token.

Their rows depend on earlier rows, so passes restrict them together with their states (``carry_states``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch.fx import Node

import vlcache_fx.ops  # noqa: F401  (defines torch.ops.vlcache)
from vlcache_fx.analysis.tokens.axis import Axes, TokenFlow, rank_of
from vlcache_fx.analysis.tokens.layout_rules import Rule, lost, single

TOKEN_DIM = 1
"""Dimension of tokens in the operands of a recurrence; samples come first."""


def _recurrence(node: Node, axes: Axes) -> TokenFlow:
    operands = [operand for operand in node.args[:5] if isinstance(operand, Node)]
    found = [axes[operand] for operand in operands if operand in axes]
    dims = {axis.dim for axis in found}
    if len(found) < len(operands) or dims not in ({TOKEN_DIM}, {0}):
        raise lost(node, "an operand of the recurrence has no row per token")
    if not all(axis.entries.are_tokens for axis in found):
        raise lost(node, "an operand of the recurrence has other rows")
    return TokenFlow(found[0].at(found[0].token_dim))


def _convolution(node: Node, axes: Axes) -> TokenFlow:
    operand, axis = single(node, axes)
    if axis.token_dim not in (0, rank_of(operand) - 1) or not axis.entries.are_tokens:
        raise lost(node, "it convolves along another dimension")
    return TokenFlow(axis.at(axis.token_dim))


CARRY_RULES: Mapping[object, Rule] = MappingProxyType(
    {torch.ops.vlcache.recur: _recurrence, torch.ops.vlcache.causal_conv1d: _convolution}
)
