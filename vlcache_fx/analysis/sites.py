"""Attention sites: one canonical view of every attention call in the graph."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from vlcache_fx.analysis.axis import shape_of
from vlcache_fx.analysis.dataflow import carries_data

SDPA = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Site:
    """One attention call.

    Attributes:
        node: the call; its result is [batch, heads, rows, head_dim].
        query, key, value: operands, [batch, heads, tokens, head_dim].
        mask: explicit mask, or None.
        is_causal: True where the call masks later tokens itself.
        scale: the softmax scale as written, or None for the default.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    is_causal: bool
    scale: float | None
    enable_gqa: bool

    @property
    def is_prefill(self) -> bool:
        """True where queries and keys run over the same tokens: self-attention without past keys."""
        queries, keys = shape_of(self.query)[-2], shape_of(self.key)[-2]
        return (
            bool(queries == keys)
            if isinstance(queries, int) and isinstance(keys, int)
            else str(queries) == str(keys)
        )


def _argument(node: Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def find_sites(graph: Graph) -> tuple[Site, ...]:
    """Every attention call, in graph order."""
    sites = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target is SDPA and carries_data(node):
            query, key, value = node.args[:3]
            assert isinstance(query, Node)
            assert isinstance(key, Node)
            assert isinstance(value, Node)
            sites.append(
                Site(
                    node,
                    query,
                    key,
                    value,
                    _argument(node, 3, "attn_mask", None),
                    bool(_argument(node, 5, "is_causal", False)),
                    _argument(node, 6, "scale", None),
                    bool(_argument(node, 7, "enable_gqa", False)),
                )
            )
    return tuple(sites)
