"""Attention that is told the places of its rows, in place of a mask that is made of them.

``restrict_rows`` gives an attention that hides later tokens by itself a mask of its rows over all tokens. To
make it in every layer takes longer than the attention, on CPUs: the kernel there compares places.
"""

from __future__ import annotations

import functools
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
BOTH = aten.__and__.Tensor


def read_places(graph: Graph) -> bool:
    """Let each attention on a CPU whose mask asks for ``arange(tokens) <= places`` call ``attend_up_to``.

    It may ask for more: that no padding is read, say.

    Returns:
        whether there was one. The graph must be traced anew then: that is no operator.
    """
    found = False
    for node in graph.find_nodes(op="call_function", target=SDPA):
        given = {**dict(zip(FIELDS, node.args[3:], strict=False)), **node.kwargs}
        conditions = _conditions(given.pop("attn_mask", None))
        compared = next((pair for pair in map(_compared, conditions) if pair is not None), None)
        if compared is None or given.pop("is_causal", False) or given.pop("dropout_p", 0.0):
            continue
        others = [one for one in conditions if _compared(one) != compared and not _holds_everywhere(one)]
        with graph.inserting_before(node):
            rest = (
                functools.reduce(lambda a, b: graph.call_function(BOTH, (a, b)), others) if others else None
            )
            call = graph.call_function(attend_up_to, (*node.args[:3], *compared, rest), given)
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        found = True
    if found:
        graph.eliminate_dead_code()
    return found


def _conditions(mask: Any) -> list[Node]:
    """What must hold at once where a mask does; all of it is broadcast from the last dimension on."""
    if not isinstance(mask, Node):
        return []
    if mask.target is BOTH:
        return [one for part in mask.args for one in _conditions(part)]
    return _conditions(mask.args[0]) if mask.target is aten.expand.default else [mask]


def _holds_everywhere(mask: Node) -> bool:
    """True for a single value that says yes to everything."""
    return mask.target is aten.new_ones.default and mask.args[1] == []


def _compared(mask: Node) -> tuple[Any, Any] | None:
    """The places, and the number of tokens, that a condition compares; None for any other condition."""
    if mask.target is not aten.le.Tensor:
        return None
    tokens, places = mask.args
    counted = _counted(tokens)
    return None if counted is None else (places, counted[0])


def _counted(tokens: Any) -> tuple[Any, int] | None:
    """How far a tensor counts from 0 along its last dimension, others being 1, and its rank; else None."""
    if not isinstance(tokens, Node):
        return None
    if tokens.target is aten.arange.default:
        device: Any = tokens.kwargs.get("device") or "cpu"
        is_counted = tokens.kwargs.get("dtype") in (None, torch.int64)
        return (tokens.args[0], 1) if is_counted and torch.device(device).type == "cpu" else None
    found = _counted(tokens.args[0]) if tokens.args else None
    if found is None:
        return None
    end, rank = found
    if tokens.target is aten.add.Tensor and tokens.args[1:] == (0,) and not tokens.kwargs:
        return found
    if tokens.target is aten.unsqueeze.default:
        place: Any = tokens.args[1]
        return (end, rank + 1) if place % (rank + 1) < rank else None
    return None


def attend_up_to(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    places: Tensor,
    tokens: int,
    rest: Tensor | None,
    **options: Any,
) -> Tensor:
    """Attention under the mask ``(arange(tokens) <= places) & rest``.

    Args:
        query: [batch, heads, rows, dim].
        key, value: [batch, key heads, tokens, dim].
        places: of the rows, [rows, 1] or [batch, 1, rows, 1]; anything else that can be compared is a mask.
        tokens: width of the mask: that of ``key``, or 1 for all tokens alike.
        rest: bool, broadcastable to [batch, heads, rows, tokens], such as what padding hides; or None.
        **options: ``scale`` and ``enable_gqa``, as in ``scaled_dot_product_attention``.
    """
    if statically_known_true(tokens == key.shape[-2]):
        result = decompose_attention(query, key, value, rest, places=places, **options)
        if isinstance(result, Tensor):
            return result
    mask = row_mask(places, tokens)
    mask = mask if rest is None else mask & rest
    return F.scaled_dot_product_attention(query, key, value, mask, **options)
