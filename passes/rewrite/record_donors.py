"""Return the tensors that donors store."""

from typing import ClassVar

from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.spec.slots import Residual


class RecordDonors(Pass):
    """Appends every K and V frontier to the results, and the last residual if results need all rows.

    This computes nothing in addition: the program has these tensors already.
    """

    name: ClassVar[str] = "record_donors"
    requires: ClassVar[frozenset[str]] = frozenset({"facts"})
    excludes: ClassVar[frozenset[str]] = frozenset({"segments", "rows_restricted"})
    ensures: ClassVar[frozenset[str]] = frozenset({"recorded"})

    def run(self, program: Program) -> bool:
        """Append the outputs; their slots are those of ``insert_lookups``."""
        facts = program.decoder
        program.add_outputs((frontier.slot, frontier.node) for frontier in facts.frontiers)
        if facts.tail_rows.selection is None:
            program.add_outputs([(Residual(), facts.stream.boundaries[-1])])
        return True
