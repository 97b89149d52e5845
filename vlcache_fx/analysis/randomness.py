"""Operators that draw random numbers. Their results cannot be reused."""

import torch
from torch.fx import Node

from vlcache_fx.analysis.attention.sites import SDPA
from vlcache_fx.ir.nodes import packet_of

aten = torch.ops.aten

DROPOUTS = frozenset({aten.dropout, aten.alpha_dropout, aten.feature_dropout, aten.native_dropout})
"""The identity, unless they draw random numbers."""


def draws_numbers(node: Node) -> bool:
    """Return True for a call whose result depends on random numbers."""
    if node.target is SDPA:
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))
    if packet_of(node) in DROPOUTS:
        rate, trains = (*node.args[1:], True)[:2]
        return bool(rate and trains)
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
