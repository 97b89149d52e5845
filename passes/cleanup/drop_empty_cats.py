"""Drop empty tensors from ``cat``, such as a new KV cache to which the first keys are appended."""

from typing import ClassVar

import torch
from torch.fx import Node

from vlcache_fx.passes.base import Pass, Program

CAT = torch.ops.aten.cat.default


class DropEmptyCats(Pass):
    """``cat([empty, x], dim)`` becomes ``x``."""

    name: ClassVar[str] = "drop_empty_cats"

    def run(self, program: Program) -> bool:
        """Remove operands without elements; a ``cat`` of one operand becomes that operand."""
        changed = False
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node.target is not CAT:
                continue
            parts = node.args[0]
            assert isinstance(parts, list | tuple)
            kept = [part for part in parts if not _is_empty(part)]
            if not kept or len(kept) == len(parts) > 1:
                continue
            changed = True
            same_dtype = kept[0].meta["val"].dtype == node.meta["val"].dtype
            if len(kept) == 1 and same_dtype:
                node.replace_all_uses_with(kept[0])
                program.graph.erase_node(node)
            else:
                node.args = (kept, *node.args[1:])
        return changed


def _is_empty(part: Node) -> bool:
    numel = part.meta["val"].numel()
    return isinstance(numel, int) and numel == 0
