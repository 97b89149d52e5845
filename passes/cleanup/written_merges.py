"""Rewrite features that are written by index as a merge."""

from typing import ClassVar

import torch
from torch.fx import Node

from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.ir.nodes import packet_of
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.cleanup.dense_deepstack import only_mask

aten = torch.ops.aten


class WrittenMerges(Pass):
    """``x[mask] = features`` becomes ``masked_scatter(x, mask, features)``, the form that analysis knows.

    Sums of features and what was there are ``DenseDeepstack``'s, which runs before.
    """

    name: ClassVar[str] = "written_merges"

    def run(self, program: Program) -> bool:
        """Replace every write of rows to tokens."""
        changed = False
        for node in list(program.graph.nodes):
            parts = _write(node)
            if parts is None:
                continue
            stream, mask, features = parts
            with program.graph.inserting_before(node):
                rows = program.graph.call_function(aten.unsqueeze.default, (mask, -1))
                merge = program.graph.call_function(aten.masked_scatter.default, (stream, rows, features))
            with node.meta["val"].fake_mode:
                rows.meta["val"] = mask.meta["val"].unsqueeze(-1)
            merge.meta["val"] = node.meta["val"]
            merge.meta["stack_trace"] = rows.meta["stack_trace"] = node.meta.get("stack_trace")
            node.replace_all_uses_with(merge)
            program.graph.erase_node(node)
            changed = True
        return changed


def _write(node: Node) -> tuple[Node, Node, Node] | None:
    """Match ``index_put(x [batch, tokens, width], [mask], features [rows, width])``.

    A single row would be written to every token, which a merge does not do.

    Returns:
        ``(x, mask, features)``, or None.
    """
    if packet_of(node) is not aten.index_put:
        return None
    if node.args[3] if len(node.args) > 3 else node.kwargs.get("accumulate", False):
        return None
    stream, indices, features = node.args[:3]
    mask = only_mask(indices)
    if mask is None or not isinstance(stream, Node) or not isinstance(features, Node):
        return None
    return (stream, mask, features) if _fits(stream, features) else None


def _fits(stream: Node, features: Node) -> bool:
    """Return True for features [rows, width] of the stream's width and dtype, and for more than one row.

    A width that the trace does not know counts as the one that it saw: the runtime compares both.
    """
    if len(shape_of(stream)) != 3 or len(shape_of(features)) != 2 or shape_of(features)[0] == 1:
        return False
    wanted, width = shape_of(stream)[-1], shape_of(features)[-1]
    if isinstance(width, torch.SymInt):
        width = width.node.hint if width.node.has_hint() else width
    return bool(
        isinstance(width, int) and width == wanted and stream.meta["val"].dtype == features.meta["val"].dtype
    )
