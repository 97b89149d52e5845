"""Attention sites: the canonical view of the attention calls of a graph."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

import vlcache_fx.ops  # noqa: F401  (defines torch.ops.vlcache)
from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.ir.dataflow import carries_data

SDPA = torch.ops.aten.scaled_dot_product_attention.default
ATTEND = torch.ops.vlcache.attend.default


@dataclass(frozen=True)
class Site:
    """One attention call.

    Attributes:
        node: the call; its result is [batch, heads, rows, head_dim].
        query, key, value: operands, [batch, heads, tokens, head_dim].
        mask: explicit mask, or None.
        is_causal: the call masks later tokens itself.
        scale: the softmax scale of the call, or None for the default.
        enable_gqa: the call allows fewer key and value heads than query heads.
        sinks: a logit per head that takes part in the softmax, [heads], or None.
        softcap: bound of the scores' magnitude, or None.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    sinks: Node | None = None
    softcap: float | None = None

    @property
    def is_prefill(self) -> bool:
        """True if queries and keys have the same tokens: self-attention without past keys."""
        queries, keys = shape_of(self.query)[-2], shape_of(self.key)[-2]
        return (
            bool(queries == keys)
            if isinstance(queries, int) and isinstance(keys, int)
            else str(queries) == str(keys)
        )


def find_sites(graph: Graph) -> tuple[Site, ...]:
    """Return the attention calls in canonical form, in graph order."""
    sites = (site_of(node) for node in graph.nodes if node.op == "call_function" and carries_data(node))
    return tuple(site for site in sites if site is not None)


def site_of(node: Node) -> Site | None:
    """Return the site of ``node``; None if it is not an attention call in canonical form."""
    if node.target is SDPA:
        names = {"mask": (3, "attn_mask"), "is_causal": (5, "is_causal"), "scale": (6, "scale")}
        names["enable_gqa"] = (7, "enable_gqa")
    elif node.target is ATTEND:
        order = ("mask", "sinks", "is_causal", "scale", "softcap", "enable_gqa")
        names = {name: (index + 3, name) for index, name in enumerate(order)}
    else:
        return None
    query, key, value = node.args[:3]
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    found: dict[str, Any] = {name: _argument(node, *argument) for name, argument in names.items()}
    flags: dict[str, Any] = {name: bool(found.pop(name)) for name in ("is_causal", "enable_gqa")}
    return Site(node, query, key, value, **found, **flags)


def _argument(node: Node, index: int, name: str) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)
