"""Return the states that recurrent layers have at the ends of records, and what records make of them."""

import operator
from typing import ClassVar

import torch

from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.rewrite.rows import index_rows
from vlcache_fx.spec.slots import Factor, Last, RecordEnd, RecordStart, Term

aten = torch.ops.aten
RECORDS = slice(10, 12)
"""Arguments of ``vlcache.recur``: the records."""


class RecordStates(Pass):
    """Appends to the results, per record, each recurrence's state and map, and last inputs of convolutions.

    A record is some consecutive tokens of the prompt, see ``plan.jumps``.
    """

    name: ClassVar[str] = "record_states"
    requires: ClassVar[frozenset[str]] = frozenset({"facts", "recorded"})
    excludes: ClassVar[frozenset[str]] = frozenset({"segments", "rows_restricted"})

    def run(self, program: Program) -> bool:
        """Append the outputs."""
        facts, graph = program.decoder, program.graph
        for tail in facts.tails:
            node, dim, width = tail.convolution.node, tail.convolution.dim, tail.convolution.width
            joined, last = node.args[0], program.add_input(Last(width))
            with graph.inserting_before(node):
                padded = graph.call_function(aten.constant_pad_nd.default, (joined, [width, 0]))
                taken = index_rows(program, padded, dim, last)
            for made in (padded, taken):
                made.meta["segment"] = f"layer.{tail.layer}"
            program.add_outputs([(tail.slot, taken)])
        for state in facts.states:
            node, layer, index = state.recurrence.node, state.layer, state.slot.index
            arguments = [*node.args, *[None] * (RECORDS.stop - len(node.args))]
            arguments[RECORDS] = [program.add_input(slot) for slot in (RecordStart(), RecordEnd())]
            node.args = tuple(arguments)
            slots = (state.slot, Factor(layer, index), Term(layer, index))
            with graph.inserting_after(node):
                results = [
                    graph.call_function(operator.getitem, (node, number))
                    for number in range(2, 2 + len(slots))
                ]
            for made in results:
                made.meta["segment"] = f"layer.{layer}"
            program.add_outputs(zip(slots, results, strict=True))
        return bool(facts.tails or facts.states)
