"""Read sizes from inputs of the graph where possible."""

from typing import ClassVar

import torch
from torch import SymInt
from torch.fx import Node

from vlcache_fx.passes.base import Pass, Program

SIZE = torch.ops.aten.sym_size.int


class AnchorSizes(Pass):
    """``sym_size(hidden, 1)`` becomes ``sym_size(tokens, 1)``, where both are the same symbol.

    Tracers read a size from any tensor that has it. A tensor that is restricted to rows later would have
    another size, while the readers need the number of all tokens.
    """

    name: ClassVar[str] = "anchor_sizes"

    def run(self, program: Program) -> bool:
        """Let every such node read the first input with this size."""
        sources: dict[str, tuple[Node, int]] = {}
        for node in program.graph.find_nodes(op="placeholder"):
            for dim, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
                if isinstance(size, SymInt) and size.node.expr.is_Symbol:
                    sources.setdefault(str(size.node.expr), (node, dim))
        changed = False
        for node in program.graph.find_nodes(op="call_function", target=SIZE):
            value = node.meta.get("val")
            source = sources.get(str(value.node.expr)) if isinstance(value, SymInt) else None
            if source is not None and node.args != source:
                node.args = source
                changed = True
        return changed
