"""Read the sizes of inputs from inputs."""

from typing import ClassVar

import torch
from torch import SymInt
from torch.fx import Node

from vlcache_fx.passes.base import Pass, Program

SIZE = torch.ops.aten.sym_size.int


class AnchorSizes(Pass):
    """``sym_size(hidden, 1)`` becomes ``sym_size(tokens, 1)``, where both are the same symbol.

    Tracers ask whatever tensor is at hand for its sizes. One that is cut to some rows later would answer for
    these, to readers that still mean all.
    """

    name: ClassVar[str] = "anchor_sizes"

    def run(self, program: Program) -> bool:
        """Point every such node at the first input that has the size."""
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
