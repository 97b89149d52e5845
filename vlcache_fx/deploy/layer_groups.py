"""Groups of consecutive layers of an exported decoder that compute the same rows."""

from __future__ import annotations

from itertools import groupby

import torch

from vlcache_fx.policies.base import Policy, ProbingPolicy, SpanContext
from vlcache_fx.policies.profile import Profile

PROBED_LENGTHS = (64, 400, 2048, 8192)
"""Span lengths for which the policy's rows are compared between layers."""


def layer_groups(policy: Policy, num_layers: int, profile: Profile | None, budget: float) -> tuple[int, ...]:
    """Return the number of layers in each group for which the policy chooses the same rows at any length.

    The choice of a probing policy depends on the request: each layer is a group.
    """
    if isinstance(policy, ProbingPolicy):
        return (1,) * num_layers
    chosen = [
        policy.select(SpanContext(length=length, num_layers=num_layers, budget=budget, profile=profile))
        for length in PROBED_LENGTHS
    ]
    is_new = [
        layer > 0 and any(not torch.equal(rows[layer - 1], rows[layer]) for rows in chosen)
        for layer in range(num_layers)
    ]
    numbers = torch.tensor(is_new).cumsum(0).tolist()
    return tuple(len(list(members)) for _, members in groupby(numbers))
