"""Splice stored and recomputed rows where positions have not entered yet."""

from typing import ClassVar

import torch
from torch.fx import Node

from vlcache_fx.passes.base import Pass, Program


class SpliceRows(Pass):
    """Behind every frontier, all tokens: the recomputed rows, and the donors' rows for the others.

    What follows the splice (rotary embedding, cache, attention operands) runs on the full sequence, so the
    graph's own position ops rotate stored keys for the place where the span stands in *this* request.
    """

    name: ClassVar[str] = "splice_rows"
    requires: ClassVar[frozenset[str]] = frozenset({"facts", "lookups"})
    ensures: ClassVar[frozenset[str]] = frozenset({"spliced"})

    def run(self, program: Program) -> bool:
        """Insert ``vlcache.splice_rows`` behind each lookup and let the full part of the layer read it."""
        facts = program.decoder
        lookups = {node.meta["slot"]: node for node in program.graph.nodes if "slot" in node.meta}
        for index, layer in enumerate(facts.layers):
            for letter, frontier in (("k", layer.key_frontier), ("v", layer.value_frontier)):
                lookup = lookups[f"{index}.{letter}"]
                spliced = _splice(program, lookup, frontier, f"source.{index}", f"layer.{index}")
                readers = [
                    u
                    for u in frontier.users
                    if u in layer.full_part or u is layer.site.node or u.op == "output"
                ]
                for reader in readers:
                    reader.replace_input_with(frontier, spliced)
        if "residual" in lookups:
            boundary = facts.stream.boundaries[-1]
            spliced = _splice(program, lookups["residual"], boundary, f"source.{facts.num_layers}", "tail")
            for reader in [user for user in boundary.users if user not in (spliced, lookups["residual"])]:
                reader.replace_input_with(boundary, spliced)
        return True


def _splice(program: Program, lookup: Node, fresh: Node, source_slot: str, segment: str) -> Node:
    source = program.add_input(source_slot)
    dim = lookup.args[2]
    with program.graph.inserting_after(lookup):
        node = program.graph.call_function(
            torch.ops.vlcache.splice_rows.default, (lookup, fresh, source, dim)
        )
    node.meta["segment"] = segment
    return node
