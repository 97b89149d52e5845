"""Bring values that flow around the residual to the rows of the layer that reads them."""

from typing import ClassVar

from torch.fx import Node

from vlcache_fx.analysis.decoder.rows import Carried
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.rewrite.rows import gather
from vlcache_fx.spec.slots import Positions


class GatherCrossLayerValues(Pass):
    """A value of layer i that layer j reads has rows of level i, of which those of level j are taken.

    The sets are nested, so none is missing. It is the last of the passes that give rows to nodes.
    """

    name: ClassVar[str] = "gather_cross_layer_values"
    requires: ClassVar[frozenset[str]] = frozenset({"facts", "rows_restricted", "kv_only"})

    def run(self, program: Program) -> bool:
        """Insert a gather in front of every such read whose two levels differ."""
        changed = False
        for carried in program.decoder.carried:
            changed |= _carry(program, carried)
        return changed


def _carry(program: Program, carried: Carried) -> bool:
    index = _index(program, carried.made_at, carried.read_at)
    if index is None:
        return False
    current = next(
        node
        for node in carried.reader.all_input_nodes
        if node is carried.operand or node.meta.get("gathers", (None,))[0] is carried.operand
    )
    segment = f"layer.{_layer_of(program, carried.reader)}"
    taken = gather(program, current, carried.dim, index, carried.reader, segment)
    carried.reader.replace_input_with(current, taken)
    return True


def _index(program: Program, made_at: int, read_at: int) -> Node | None:
    """Places of the later level's rows among the earlier one's; None where both are the same."""
    before, after = program.row_inputs[made_at], program.row_inputs[read_at]
    if after is None or made_at == read_at:
        return None
    return after if before is None else program.add_input(Positions(made_at, read_at))


def _layer_of(program: Program, node: Node) -> int:
    members = program.decoder.stream.members
    return next(index for index, nodes in enumerate(members) if node in nodes)
