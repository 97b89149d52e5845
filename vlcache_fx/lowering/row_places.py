"""Attention that is told the places of its rows, in place of a mask that is made of them.

``restrict_rows`` gives an attention that hides later tokens by itself a mask of its rows over all tokens. To
make it in every layer takes longer than the attention, on CPUs: the kernel there compares places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from vlcache_fx.ops import decompose_attention, row_mask

__all__ = ["attend_up_to", "read_places"]

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
FIELDS = ("attn_mask", "dropout_p", "is_causal")


def read_places(graph: Graph) -> bool:
    """Let each attention on a CPU whose mask is ``arange(tokens) <= places`` call ``attend_up_to``.

    Returns:
        whether there was one. The graph must be traced anew then: that is no operator.
    """
    found = False
    for node in graph.find_nodes(op="call_function", target=SDPA):
        given = {**dict(zip(FIELDS, node.args[3:], strict=False)), **node.kwargs}
        compared = _compared(given.pop("attn_mask", None))
        if compared is None or given.pop("is_causal", False) or given.pop("dropout_p", 0.0):
            continue
        with graph.inserting_before(node):
            call = graph.call_function(attend_up_to, (*node.args[:3], *compared), given)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        found = True
    if found:
        graph.eliminate_dead_code()
    return found


def _compared(mask: Any) -> tuple[Any, Any] | None:
    """The places, and the number of tokens, that a mask is made of; None for any other mask."""
    if not isinstance(mask, Node) or mask.target is not aten.le.Tensor:
        return None
    tokens, places = mask.args
    if not isinstance(tokens, Node) or tokens.target is not aten.arange.default:
        return None
    device: Any = tokens.kwargs.get("device") or "cpu"
    is_counted = tokens.kwargs.get("dtype") in (None, torch.int64)
    return (places, tokens.args[0]) if is_counted and torch.device(device).type == "cpu" else None


def attend_up_to(
    query: Tensor, key: Tensor, value: Tensor, places: Tensor, tokens: int, **options: Any
) -> Tensor:
    """Attention under the mask ``arange(tokens) <= places``.

    Args:
        query: [batch, heads, rows, dim].
        key, value: [batch, key heads, tokens, dim].
        places: of the rows, [rows, 1] or [batch, 1, rows, 1]; anything else that can be compared is a mask.
        tokens: width of the mask: that of ``key``, or 1 for all tokens alike.
        **options: ``scale`` and ``enable_gqa``, as in ``scaled_dot_product_attention``.
    """
    if statically_known_true(tokens == key.shape[-2]):
        result = decompose_attention(query, key, value, places=places, **options)
        if isinstance(result, Tensor):
            return result
    return F.scaled_dot_product_attention(query, key, value, row_mask(places, tokens), **options)
