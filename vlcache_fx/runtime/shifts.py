"""Inputs that say how much a KV cache holds: they move all tokens alike, and are no part of a donor's key."""

import torch
from torch import Tensor
from torch.fx import Node

from vlcache_fx.analysis.axis import is_one
from vlcache_fx.analysis.frontier import LAYOUT, packet_of

aten = torch.ops.aten

COPIES = LAYOUT | {aten._to_copy}
SUMS = frozenset({aten.add, aten.sub})


def only_shifts(node: Node) -> bool:
    """True for a single integer of the request that is only ever added: the number of tokens in a cache."""
    value = node.meta["val"]
    if value.is_floating_point() or value.dtype == torch.bool or not all(map(is_one, value.shape)):
        return False
    copies = [node]
    while copies:
        for user in copies.pop().users:
            if packet_of(user) in COPIES:
                copies.append(user)
            elif user.op != "output" and packet_of(user) not in SUMS:
                return False
    return True


def same_for_all(value: Tensor, num_tokens: int) -> bool:
    """True for flags or integers over more tokens than those of the call, where all are equal.

    Of a cache's tokens and the call's, that is: a padding mask that hides none.
    """
    if value.is_floating_point() or value.dim() == 0 or value.shape[-1] <= num_tokens:
        return False
    return bool((value == value.flatten()[0]).all())
