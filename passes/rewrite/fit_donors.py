"""Fit donors of several contexts to the rows that a call recomputes."""

from typing import ClassVar

import torch
from torch.fx import Node

from vlcache_fx.ir.fakes import FakeInputs
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.spec.differences import BLOCK_ROWS
from vlcache_fx.spec.slots import (
    Difference,
    Donor,
    DonorRow,
    Key,
    LeftDonor,
    LeftRow,
    Rows,
    Source,
    Value,
)

vlcache = torch.ops.vlcache


class FitDonors(Pass):
    """Replaces every splice of keys and values by ``vlcache.fit_rows``.

    A donor's rows become the mean of its contexts and the combination of their differences that is closest to
    the rows that the layer recomputes. The program serves donors with and without differences.
    """

    name: ClassVar[str] = "fit_donors"
    requires: ClassVar[frozenset[str]] = frozenset({"hoisted", "segments", "inputs_declared"})
    excludes: ClassVar[frozenset[str]] = frozenset({"unpacked"})
    ensures: ClassVar[frozenset[str]] = frozenset({"fitted"})

    def run(self, program: Program) -> bool:
        """Rewrite the splices, and add the inputs ``difference.<slot>.left``, ``.core`` and ``.right``."""
        splices = [node for node in program.graph.nodes if node.target == vlcache.splice_rows.default]
        slots = {node: slot for slot, node in program.slots.items()}
        sizes: FakeInputs | None = None
        for node in splices:
            table, fresh, source, dim, *batch = node.args
            slot, level = slots.get(table), slots.get(source)
            if not isinstance(slot, Donor) or not isinstance(slot.stored, Key | Value):
                continue
            assert isinstance(level, Source)
            sizes = sizes or FakeInputs(beside=table.meta["val"])
            shared = [
                program.add_input(DonorRow(), source.meta["val"]),
                program.add_input(LeftRow(), source.meta["val"]),
                *_factors(program, sizes, slot.stored, table, dim, *batch),
            ]
            args = (table, fresh, source, program.slots[Rows(level.level)], *shared, dim, *batch)
            with program.graph.inserting_before(node):
                fitted = program.graph.call_function(vlcache.fit_rows.default, args)
            fitted.meta.update(node.meta)
            node.replace_all_uses_with(fitted)
            program.graph.erase_node(node)
        return sizes is not None


def _factors(
    program: Program,
    sizes: FakeInputs,
    slot: Key | Value,
    table: Node,
    dim: int,
    batch_dim: int | None = None,
) -> list[Node]:
    """Return the inputs ``left``, ``core``, ``right`` and ``left_donor``."""
    value, width = table.meta["val"], 1
    for at, size in enumerate(value.shape):
        width = width if at in (dim, batch_dim) else width * size
    rank, donors, blocks = (sizes.size(name) for name in (f"rank_{width}", "fitted_donors", "blocks"))
    shapes: dict[str, list[int | torch.SymInt]] = {
        "left": [blocks, BLOCK_ROWS, rank],
        "core": [donors, sizes.size("contexts"), rank, rank],
        "right": [donors, rank, width],
    }
    made = {part: sizes.tensor(shape, value.dtype, value.device) for part, shape in shapes.items()}
    return [
        *(program.add_input(Difference(slot, part), made[part]) for part in Difference.parts),
        program.add_input(LeftDonor(), sizes.tensor([blocks], torch.int64, value.device)),
    ]
