"""Drop assertions that the numbers of placeholders and encoder features are equal."""

from typing import ClassVar

import torch
from torch.fx import Node

from vlcache_fx.analysis.decoder.merge import MERGE_OPS, SCATTER_ROWS
from vlcache_fx.ir.subgraph import needed_for
from vlcache_fx.passes.base import Pass, Program

ASSERT = torch.ops.aten._assert_scalar.default


class DropMergeChecks(Pass):
    """Drops assertions about inputs of a merge, which read a number from a tensor and so synchronise.

    The runtime compares the numbers before it runs a program. Where they differ, the unmodified model runs
    and raises its own error. Other assertions stay.
    """

    name: ClassVar[str] = "drop_merge_checks"

    def run(self, program: Program) -> bool:
        """Erase the assertions; dead-code elimination removes their conditions."""
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
