"""Tag every node with its segment: ``prelude``, ``layer.<i>`` or ``tail``."""

from typing import ClassVar

from vlcache_fx.ir.nodes import LAYOUT, packet_of
from vlcache_fx.passes.base import Pass, Program


class TagSegments(Pass):
    """Sets ``meta["segment"]`` so that equal layers become equal segments, which lowerings compile once.

    Nodes outside the residual stream belong to the prelude, except layout ops and sizes with a single reading
    layer: they belong to this layer, since tracers repeat them per layer.
    """

    name: ClassVar[str] = "tag_segments"
    requires: ClassVar[frozenset[str]] = frozenset({"facts"})
    ensures: ClassVar[frozenset[str]] = frozenset({"segments"})

    def run(self, program: Program) -> bool:
        """Tag every node without a tag."""
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
