"""Drop in-graph checks that placeholders and encoder features agree in number."""

from typing import ClassVar

import torch
from torch.fx import Node

from vlcache_fx.analysis.decoder.merge import MERGE_OPS, SCATTER_ROWS
from vlcache_fx.ir.subgraph import needed_for
from vlcache_fx.passes.base import Pass, Program

ASSERT = torch.ops.aten._assert_scalar.default


class DropMergeChecks(Pass):
    """Assertions about what flows into a merge read a number from a tensor: no segment should wait for one.

    The runtime makes the same comparison before it runs a program, and leaves a call that does not pass it to
    the unmodified model, which then raises its own error. Other assertions stay.
    """

    name: ClassVar[str] = "drop_merge_checks"

    def run(self, program: Program) -> bool:
        """Erase the assertions; dead-code elimination takes what computed their conditions."""
        inputs: set[Node] = set()
        for node in program.graph.nodes:
            if node.target in MERGE_OPS or node.target is SCATTER_ROWS:
                inputs |= needed_for([node])
        dropped = False
        for node in list(program.graph.nodes):
            if node.target is not ASSERT:
                continue
            placeholders = {p for p in needed_for([node]) if p.op == "placeholder"}
            if inputs and placeholders <= inputs:
                program.graph.erase_node(node)
                dropped = True
        return dropped
