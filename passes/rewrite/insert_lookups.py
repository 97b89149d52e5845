"""Insert the lookup nodes, through which stored keys and values enter the graph."""

from typing import ClassVar

import torch

import vlcache_fx.ops  # noqa: F401  (defines torch.ops.vlcache)
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.spec.slots import Residual, StoredSlot


class InsertLookups(Pass):
    """One ``vlcache.lookup`` at every K and V frontier, and at the last residual if results need all rows.

    A lookup returns the donor table of its slot: the concatenated rows of all hit spans, in the layout of the
    frontier. No node reads the lookups before ``splice_rows``.
    """

    name: ClassVar[str] = "insert_lookups"
    requires: ClassVar[frozenset[str]] = frozenset({"facts"})
    excludes: ClassVar[frozenset[str]] = frozenset({"segments", "rows_restricted"})
    ensures: ClassVar[frozenset[str]] = frozenset({"lookups"})

    def run(self, program: Program) -> bool:
        """Insert the nodes; their slots are ``<layer>.k``, ``<layer>.v`` and ``residual``."""
        facts = program.decoder
        for frontier in facts.frontiers:
            _insert(program, frontier.slot, frontier.node, frontier.dim, f"layer.{frontier.layer}")
        if facts.tail_rows.selection is None:
            _insert(program, Residual(), facts.stream.boundaries[-1], facts.tail_rows.axis, "tail")
        return True


def _insert(program: Program, slot: StoredSlot, frontier: torch.fx.Node, dim: int, segment: str) -> None:
    with program.graph.inserting_after(frontier):
        node = program.graph.call_function(torch.ops.vlcache.lookup.default, (frontier, str(slot), dim))
    node.meta.update(segment=segment, slot=slot, frontier=frontier)
