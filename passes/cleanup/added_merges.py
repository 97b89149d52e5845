"""Rewrite features that are added to the placeholders' embeddings as a merge and an addition."""

from typing import ClassVar

import torch
from torch.fx import Node

from vlcache_fx.ir.nodes import packet_of
from vlcache_fx.passes.base import Pass, Program

aten = torch.ops.aten


class AddedMerges(Pass):
    """``masked_scatter(x, mask, x[mask] + features)`` becomes a merge of the features plus ``x`` at the mask.

    That is ``masked_scatter(x, mask, features) + masked_fill(x, ~mask, 0)``. Features alone then enter at the
    merge, where analysis looks for them, and no size depends on data.
    """

    name: ClassVar[str] = "added_merges"

    def run(self, program: Program) -> bool:
        """Replace every merge of a sum to the elements from which it was read."""
        changed = False
        for node in list(program.graph.nodes):
            parts = _sum(node)
            if parts is None:
                continue
            embeddings, mask, features = parts
            call, values = program.graph.call_function, node.meta["val"]
            with program.graph.inserting_before(node):
                merge = call(aten.masked_scatter.default, (embeddings, mask, features))
                others = call(aten.logical_not.default, (mask,))
                placeholders = call(aten.masked_fill.Scalar, (embeddings, others, 0))
                result = call(aten.add.Tensor, (merge, placeholders))
            others.meta["val"] = mask.meta["val"]
            merge.meta["val"] = placeholders.meta["val"] = result.meta["val"] = values
            for made in (merge, others, placeholders, result):
                made.meta["stack_trace"] = node.meta.get("stack_trace")
            node.replace_all_uses_with(result)
            program.graph.erase_node(node)
            changed = True
        return changed


def _sum(node: Node) -> tuple[Node, Node, Node] | None:
    """Match ``masked_scatter(x, mask, index(x, [mask]) + features)`` with a mask of the shape of ``x``.

    Returns:
        ``(x, mask, features)``, or None.
    """
    if packet_of(node) is not aten.masked_scatter:
        return None
    embeddings, mask, total = node.args
    if not isinstance(total, Node) or total.target is not aten.add.Tensor or total.kwargs:
        return None
    for read, features in (total.args, total.args[::-1]):
        if not isinstance(read, Node) or packet_of(read) is not aten.index or not isinstance(features, Node):
            continue
        assert isinstance(embeddings, Node)
        assert isinstance(mask, Node)
        source, indices = read.args
        same = source is embeddings and isinstance(indices, list | tuple) and list(indices) == [mask]
        if same and len(features.meta["val"].shape) == 1 and _same_shape(embeddings, mask):
            return embeddings, mask, features
    return None


def _same_shape(embeddings: Node, mask: Node) -> bool:
    """Whether the mask names elements: with fewer dimensions, ``index`` reads rows."""
    return len(embeddings.meta["val"].shape) == len(mask.meta["val"].shape)
