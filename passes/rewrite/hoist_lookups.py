"""Replace lookups by graph inputs."""

from typing import ClassVar

from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.spec.slots import Donor


class HoistLookups(Pass):
    """Makes donor tables inputs, so that the program is a pure function of tensors.

    Compilers, CUDA graphs and exported engines need such a function. The runtime binds the tables.
    """

    name: ClassVar[str] = "hoist_lookups"
    requires: ClassVar[frozenset[str]] = frozenset({"spliced"})
    excludes: ClassVar[frozenset[str]] = frozenset({"segments", "rows_restricted"})
    ensures: ClassVar[frozenset[str]] = frozenset({"hoisted"})

    def run(self, program: Program) -> bool:
        """Replace every lookup by the input ``donor.<slot>``."""
        lookups = [node for node in program.graph.nodes if "slot" in node.meta]
        for node in lookups:
            donor = program.add_input(Donor(node.meta["slot"]))
            donor.meta["donor_of"] = (node.meta["frontier"], node.args[2])
            node.replace_all_uses_with(donor)
            program.graph.erase_node(node)
        return bool(lookups)
