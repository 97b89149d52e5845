"""Let the cold program return what is stored as a donor."""

from typing import ClassVar

from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.spec.slots import Residual


class RecordDonors(Pass):
    """Append every K and V frontier to the results (and the last residual, where results need all rows).

    No second computation: these tensors exist in the program anyway.
    """

    name: ClassVar[str] = "record_donors"
    requires: ClassVar[frozenset[str]] = frozenset({"facts"})
    excludes: ClassVar[frozenset[str]] = frozenset({"segments", "rows_restricted"})
    ensures: ClassVar[frozenset[str]] = frozenset({"recorded"})

    def run(self, program: Program) -> bool:
        """Append the outputs; their names are the slots that ``insert_lookups`` reads."""
        facts = program.decoder
        program.add_outputs((frontier.slot, frontier.node) for frontier in facts.frontiers)
        if facts.tail_rows.selection is None:
            program.add_outputs([(Residual(), facts.stream.boundaries[-1])])
        return True
