"""Recognise decoding steps in Dynamo's graph, before capture, which may fail."""

import torch
from torch import fx
from torch.fx import Node
from torch.nn import functional as F

ATTENTION = frozenset(
    {
        F.scaled_dot_product_attention,
        torch.ops.higher_order.flex_attention,
        F.softmax,
        torch.softmax,
        "softmax",
    }
)
"""Calls with one row per query, in dimension -2 of the result."""

MERGES = frozenset({torch.masked_scatter, "masked_scatter"})


def attends(graph: fx.Graph) -> bool:
    """Return True if the graph has attention in any form."""
    return any(
        node.target in ATTENTION for node in graph.nodes if node.op in ("call_function", "call_method")
    )


def is_decode_step(graph: fx.Graph) -> bool:
    """Return True if every attention has a single query and no features are merged."""
    calls = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
    if any(node.target in MERGES for node in calls):
        return False
    attended = [node for node in calls if node.target in ATTENTION]
    return bool(attended) and all(map(_has_one_row, attended))


def _has_one_row(node: Node) -> bool:
    value = node.meta.get("example_value")
    if isinstance(value, tuple | list):  # flex attention also returns its log-sum-exp
        value = value[0]
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return False
    rows = value.shape[-2]
    return isinstance(rows, int) and rows == 1
