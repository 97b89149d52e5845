"""Compute only the rows that results need after the last layer."""

from typing import ClassVar

import torch
from torch.fx import Node

from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.rewrite.rows import restrict_node, sample_dim
from vlcache_fx.spec.slots import Results

aten = torch.ops.aten


class TrimTail(Pass):
    """Restricts the tail to the tokens that results select, as in ``hidden[:, -1:]``.

    Level L then has the rows of the selection (and possibly one more, see ``plan``), so the selection becomes
    a gather of their positions in level L, the input ``results``.
    """

    name: ClassVar[str] = "trim_tail"
    requires: ClassVar[frozenset[str]] = frozenset({"facts", "rows_restricted"})

    def run(self, program: Program) -> bool:
        """Restrict the tail up to the selection and replace the selection."""
        facts = program.decoder
        rows, selection = program.row_inputs[-1], facts.tail_rows.selection
        if rows is None or selection is None:
            return False
        for node, flow in facts.tail_rows.flows.items():
            restrict_node(program, node, flow, rows, facts.layers[-1].site, "tail")
        source = selection.args[0]
        assert isinstance(source, Node)
        axis = _axis_of(program, source)
        with program.graph.inserting_before(selection):
            results = program.add_input(Results())
            if not program.is_batched:
                taken = program.graph.call_function(aten.index_select.default, (source, axis, results))
            else:
                args = (source, results, axis, sample_dim(program, source))
                taken = program.graph.call_function(torch.ops.vlcache.take_rows.default, args)
            if selection.target is aten.select.int:
                taken = program.graph.call_function(aten.squeeze.dim, (taken, axis))
        taken.meta["segment"] = "tail"
        selection.replace_all_uses_with(taken)
        program.graph.erase_node(selection)
        return True


def _axis_of(program: Program, source: Node) -> int:
    facts = program.decoder
    flow = facts.tail_rows.flows.get(source)
    return facts.tail_rows.axis if flow is None else flow.dim
