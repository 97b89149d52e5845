"""Rewrite features that are added to the placeholders' embeddings as a merge of the sums."""

from typing import ClassVar

import torch
from torch.fx import Node

from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.ir.nodes import packet_of
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.cleanup.dense_deepstack import by_token

aten = torch.ops.aten


class AddedMerges(Pass):
    """``masked_scatter(x, mask, x[mask] + features)`` becomes a merge of rows ``features + weight[token]``.

    That is equal for ``x = embedding(weight, ids)`` and ``mask = ids == token``: all placeholders have one
    embedding. No size then depends on data, and features of any number can be matched with placeholders.
    """

    name: ClassVar[str] = "added_merges"

    def run(self, program: Program) -> bool:
        """Replace every merge of a sum to the elements from which it was read."""
        changed = False
        for node in list(program.graph.nodes):
            parts = _sum(node)
            if parts is None:
                continue
            features, weight, token = parts
            embeddings, mask, _ = node.args
            call, width = program.graph.call_function, shape_of(node)[-1]
            with program.graph.inserting_before(node), node.meta["val"].fake_mode:
                rows = call(aten.view.default, (features, [-1, width]))
                rows.meta["val"] = features.meta["val"].view(-1, width)
                placeholder = call(aten.select.int, (weight, 0, token))
                placeholder.meta["val"] = weight.meta["val"].select(0, token)
                total = call(aten.add.Tensor, (rows, placeholder))
                total.meta["val"] = rows.meta["val"] + placeholder.meta["val"]
                merge = call(aten.masked_scatter.default, (embeddings, mask, total))
                merge.meta["val"] = node.meta["val"]
            for made in (rows, placeholder, total, merge):
                made.meta["stack_trace"] = node.meta.get("stack_trace")
            node.replace_all_uses_with(merge)
            program.graph.erase_node(node)
            changed = True
        return changed


def _sum(node: Node) -> tuple[Node, Node, int] | None:
    """Match the merge of a sum, with a mask of the shape of the embeddings and features of one dimension.

    Returns:
        ``(features, weight, token)``, or None.
    """
    if packet_of(node) is not aten.masked_scatter:
        return None
    embeddings, mask, total = node.args
    if not (isinstance(embeddings, Node) and isinstance(mask, Node) and isinstance(total, Node)):
        return None
    if total.target is not aten.add.Tensor or total.kwargs:
        return None
    found = _placeholder(embeddings, mask)
    for read, features in (total.args, total.args[::-1]):
        if not isinstance(read, Node) or packet_of(read) is not aten.index or not isinstance(features, Node):
            continue
        source, indices = read.args
        same = source is embeddings and isinstance(indices, list | tuple) and list(indices) == [mask]
        elements = len(shape_of(embeddings)) == len(shape_of(mask)) and len(shape_of(features)) == 1
        if found is not None and same and elements:
            return features, *found
    return None


def _placeholder(embeddings: Node, mask: Node) -> tuple[Node, int] | None:
    """Match ``embedding(weight, ids)`` and a mask ``ids == token``; return ``(weight, token)``, or None."""
    source = mask.args[0] if packet_of(mask) is aten.expand else mask
    mask = by_token(source) if isinstance(source, Node) else mask
    if packet_of(embeddings) is not aten.embedding or mask.target is not aten.eq.Scalar:
        return None
    weight, ids = embeddings.args[:2]
    compared, token = mask.args
    if ids is not compared or not isinstance(weight, Node) or not isinstance(token, int):
        return None
    return weight, token
