"""Splice stored and recomputed rows before positions enter."""

from typing import Any, ClassVar

import torch
from torch.fx import Node

from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.rewrite.rows import sample_dim
from vlcache_fx.spec.slots import Residual, Source


class SpliceRows(Pass):
    """Completes every frontier to all tokens: recomputed rows, and donor rows for the others.

    Nodes after the splice (rotary embedding, cache, attention operands) run on the full sequence, so the
    graph's own operators rotate stored keys to the span's position in the current request.
    """

    name: ClassVar[str] = "splice_rows"
    requires: ClassVar[frozenset[str]] = frozenset({"facts", "lookups"})
    excludes: ClassVar[frozenset[str]] = frozenset({"segments", "recorded", "rows_restricted"})
    ensures: ClassVar[frozenset[str]] = frozenset({"spliced"})

    def run(self, program: Program) -> bool:
        """Insert ``vlcache.splice_rows`` after each lookup and let the full part of the layer read it."""
        facts = program.decoder
        lookups = {node.meta["slot"]: node for node in program.graph.nodes if "slot" in node.meta}
        full = {node for layer in facts.layers for node in layer.full_part}
        full |= {site.node for site in facts.sites}
        for frontier in facts.frontiers:
            lookup, segment = lookups[frontier.slot], f"layer.{frontier.layer}"
            spliced = _splice(program, lookup, frontier.node, Source(frontier.layer), segment)
            for reader in [user for user in frontier.node.users if user in full or user.op == "output"]:
                reader.replace_input_with(frontier.node, spliced)
        if Residual() in lookups:
            boundary = facts.stream.boundaries[-1]
            spliced = _splice(program, lookups[Residual()], boundary, Source(facts.num_layers), "tail")
            for reader in [user for user in boundary.users if user not in (spliced, lookups[Residual()])]:
                reader.replace_input_with(boundary, spliced)
        return True


def _splice(program: Program, lookup: Node, fresh: Node, slot: Source, segment: str) -> Node:
    source = program.add_input(slot)
    dim = lookup.args[2]
    with program.graph.inserting_after(lookup):
        args: tuple[Any, ...] = (lookup, fresh, source, dim)
        if program.is_batched:
            args = (*args, sample_dim(program, fresh))
        node = program.graph.call_function(torch.ops.vlcache.splice_rows.default, args)
    node.meta["segment"] = segment
    return node
