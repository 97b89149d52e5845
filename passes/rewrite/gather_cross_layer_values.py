"""Gather values of earlier layers at the rows of the layer that reads them."""

from typing import ClassVar

from torch.fx import Node

from vlcache_fx.analysis.decoder.rows import Carried
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.rewrite.rows import gather
from vlcache_fx.spec.slots import Positions


class GatherCrossLayerValues(Pass):
    """Gathers a value of layer i, which layer j reads outside the residual stream, at the rows of layer j.

    The value has the rows of level i. Row sets are nested, so it contains all rows of level j. Runs after the
    other passes that restrict rows.
    """

    name: ClassVar[str] = "gather_cross_layer_values"
    requires: ClassVar[frozenset[str]] = frozenset({"facts", "rows_restricted", "kv_only"})

    def run(self, program: Program) -> bool:
        """Insert a gather before every such read with two different levels."""
        changed = False
        for carried in program.decoder.carried:
            changed |= _gather(program, carried)
        return changed


def _gather(program: Program, carried: Carried) -> bool:
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
    """Return the positions of the later level's rows among those of the earlier level; None if equal."""
    before, after = program.row_inputs[made_at], program.row_inputs[read_at]
    if after is None or made_at == read_at:
        return None
    return after if before is None else program.add_input(Positions(made_at, read_at))


def _layer_of(program: Program, node: Node) -> int:
    members = program.decoder.stream.members
    return next(index for index, nodes in enumerate(members) if node in nodes)
