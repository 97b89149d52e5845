"""Merge encoder features into the active rows only."""

from typing import Any, ClassVar

import torch
from torch.fx import Node

from vlcache_fx.analysis.decoder.merge import Merge
from vlcache_fx.analysis.tokens.axis import stream_dim
from vlcache_fx.passes.base import Pass, Program

aten = torch.ops.aten


class RestrictMerge(Pass):
    """Replaces a ``masked_scatter`` over all tokens, followed by a gather of rows, by gathers of the rows.

    The k-th True of the mask takes the k-th row of the features, so ``cumsum(mask) - 1`` is the index of each
    row's features. Only for a single sample, and for merges without other readers. The features are declared
    to be as wide as the embeddings, which the trace may not know; the runtime checks it.
    """

    name: ClassVar[str] = "restrict_merge"
    requires: ClassVar[frozenset[str]] = frozenset({"facts", "rows_restricted"})

    def run(self, program: Program) -> bool:
        """Rewrite the merges in reverse order: each rewrite gathers the embeddings, an earlier merge."""
        changed = False
        for merge in reversed(program.decoder.merges):
            readers = list(merge.node.users)
            dim = stream_dim(merge.node)
            if _is_plain(merge) and readers and all(_takes_rows(reader, dim) for reader in readers):
                for reader in readers:
                    _merge_rows(program, merge, reader)
                program.graph.erase_node(merge.node)
                changed = True
        return changed


def _is_plain(merge: Merge) -> bool:
    shape, mask = merge.node.meta["val"].shape, merge.mask.meta["val"]
    three = len(shape) == 3 and mask.dim() == 3 and (shape[0], mask.shape[0]) == (1, 1)
    has_width = merge.features.op == "placeholder" or isinstance(merge.features.meta["val"].shape[-1], int)
    return three and has_width and isinstance(shape[2], int)


def _declare_width(merge: Merge) -> int:
    width, value = merge.node.meta["val"].shape[2], merge.features.meta["val"]
    assert isinstance(width, int)
    if not isinstance(value.shape[-1], int):
        with value.fake_mode:
            sizes = [*value.shape[:-1], width]
            merge.features.meta["val"] = torch.empty(sizes, dtype=value.dtype, device=value.device)
    return width


def _takes_rows(reader: Node, dim: int) -> bool:
    return reader.target is aten.index_select.default and bool(reader.args[1] == dim)


def _merge_rows(program: Program, merge: Merge, reader: Node) -> None:
    _, dim, rows = reader.args

    def call(target: torch._ops.OpOverload, *args: Any) -> Node:
        node = program.graph.call_function(target, args)
        node.meta["segment"] = "prelude"
        return node

    with program.graph.inserting_before(reader):
        flags = call(aten.select.int, merge.mask, -1, 0)
        count = call(aten.cumsum.default, flags, 1)
        index = call(aten.clamp.default, call(aten.sub.Tensor, count, 1), 0)
        taken = call(aten.index_select.default, index, 1, rows)
        features = call(aten.reshape.default, merge.features, [-1, _declare_width(merge)])
        merged = call(aten.index.Tensor, features, [taken])
        embeddings = call(aten.index_select.default, merge.embeddings, dim, rows)
        is_feature = call(aten.unsqueeze.default, call(aten.index_select.default, flags, 1, rows), -1)
        result = call(aten.where.self, is_feature, merged, embeddings)
    result.meta.update(reader.meta)
    reader.replace_all_uses_with(result)
    program.graph.erase_node(reader)
