"""Rewrite features that are added where token embeddings are zero as a merge."""

import math
from typing import ClassVar

import torch
from torch.fx import Node

from vlcache_fx.analysis.decoder.merge import SCATTER_ROWS
from vlcache_fx.ir.nodes import packet_of
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.cleanup.dense_deepstack import by_token

aten = torch.ops.aten


class MergeSums(Pass):
    """``where(mask, x + scatter_rows(features, mask), x)`` becomes ``masked_scatter(x, mask, features)``.

    That is equal where ``x`` is zero at the mask. Some models clear the embeddings of placeholders, and add
    features before each of several layers, the first one included; analysis looks for a merge.
    """

    name: ClassVar[str] = "merge_sums"

    def run(self, program: Program) -> bool:
        """Replace every addition to cleared embeddings."""
        changed = False
        for node in list(program.graph.nodes):
            parts = _addition(node)
            if parts is None:
                continue
            stream, mask, features = parts
            if not _cleared(stream, mask):
                continue
            with program.graph.inserting_before(node):
                merge = program.graph.call_function(aten.masked_scatter.default, (stream, mask, features))
            merge.meta["val"] = node.meta["val"]
            merge.meta["stack_trace"] = node.meta.get("stack_trace")
            node.replace_all_uses_with(merge)
            program.graph.erase_node(node)
            changed = True
        return changed


def _addition(node: Node) -> tuple[Node, Node, Node] | None:
    """Match what ``DenseDeepstack`` makes; return ``(x, mask [batch, tokens, 1], features)``, or None."""
    if node.target is not aten.where.self:
        return None
    mask, total, stream = node.args
    if not (isinstance(mask, Node) and isinstance(total, Node) and isinstance(stream, Node)):
        return None
    if total.target is not aten.add.Tensor or total.args[0] is not stream:
        return None
    dense = total.args[1]
    if not isinstance(dense, Node) or dense.target is not SCATTER_ROWS:
        return None
    features, own = dense.args
    assert isinstance(features, Node)
    assert isinstance(own, Node)
    return (stream, mask, features) if by_token(own) is by_token(mask) else None


def _cleared(node: Node, mask: Node) -> bool:
    """Return True if ``node`` is zero at ``mask``: a multiple of embeddings that were filled with zeros."""
    while packet_of(node) in (aten.mul, aten.to, aten._to_copy) and isinstance(node.args[0], Node):
        factor = node.args[1] if packet_of(node) is aten.mul else 1
        if not isinstance(factor, int | float) or not math.isfinite(factor):
            return False
        node = node.args[0]
    if packet_of(node) is not aten.masked_fill or node.args[2] != 0:
        return False
    filled = node.args[1]
    return isinstance(filled, Node) and by_token(filled) is by_token(mask)
