"""Turn lookups into graph inputs."""

from typing import ClassVar

from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.spec.program import DONOR


class HoistLookups(Pass):
    """The donor tables become placeholders, so that the program is a pure function of tensors.

    Compilers, CUDA graphs and exported engines need them there; who runs the program binds them.
    """

    name: ClassVar[str] = "hoist_lookups"
    requires: ClassVar[frozenset[str]] = frozenset({"lookups"})
    ensures: ClassVar[frozenset[str]] = frozenset({"hoisted"})

    def run(self, program: Program) -> bool:
        """Replace every lookup by the input ``donor.<slot>``."""
        lookups = [node for node in program.graph.nodes if "slot" in node.meta]
        for node in lookups:
            donor = program.add_input(f"{DONOR}{node.meta['slot']}")
            donor.meta["donor_of"] = (node.meta["frontier"], node.args[2])
            node.replace_all_uses_with(donor)
            program.graph.erase_node(node)
        return bool(lookups)
