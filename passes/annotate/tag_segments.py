"""Tag every node with the segment it belongs to: ``prelude``, ``layer.<i>`` or ``tail``."""

from typing import ClassVar

from vlcache_fx.ir.nodes import LAYOUT, packet_of
from vlcache_fx.passes.base import Pass, Program


class TagSegments(Pass):
    """Lowerings compile each distinct segment structure once, so equal layers must be cut equally.

    Nodes outside the residual stream belong to the prelude, except pure layout ops and sizes that a single
    layer
    reads: those move into it, as tracers repeat them per layer.
    """

    name: ClassVar[str] = "tag_segments"
    requires: ClassVar[frozenset[str]] = frozenset({"facts"})
    ensures: ClassVar[frozenset[str]] = frozenset({"segments"})

    def run(self, program: Program) -> bool:
        """Set ``meta["segment"]`` on every node that has none yet."""
        stream = program.layered.stream
        known = {node: f"layer.{index}" for index, members in enumerate(stream.members) for node in members}
        known.update(dict.fromkeys(stream.tail, "tail"))
        for node in reversed(program.graph.nodes):
            if node.op in ("placeholder", "output", "get_attr") or "segment" in node.meta:
                continue
            if node in known:
                node.meta["segment"] = known[node]
                continue
            readers = {user.meta.get("segment") for user in node.users if user.op != "output"}
            movable = packet_of(node) in LAYOUT and node not in stream.nodes
            single = next(iter(readers)) if len(readers) == 1 else None
            node.meta["segment"] = single if movable and single is not None else "prelude"
        return True
