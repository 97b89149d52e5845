"""Fit donors of several contexts to the rows that a call recomputes."""

from typing import Any, ClassVar

import torch
from torch.fx import Node

from vlcache_fx.ir.fakes import FakeInputs
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.spec.differences import BLOCK_ROWS
from vlcache_fx.spec.slots import (
    Difference,
    Donor,
    DonorRow,
    InputSlot,
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
        sizes: FakeInputs | None = None
        for node in splices:
            table, fresh, source, dim, *batch = node.args
            slot, level = _slot_of(program, table), _slot_of(program, source)
            if not isinstance(slot, Donor) or not isinstance(slot.stored, Key | Value):
                continue
            assert isinstance(level, Source)
            sizes = sizes or FakeInputs(beside=table.meta["val"])
            shared = [
                _input(program, DonorRow(), source.meta["val"]),
                _input(program, LeftRow(), source.meta["val"]),
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
        *(_input(program, Difference(slot, part), made[part]) for part in Difference.parts),
        _input(program, LeftDonor(), sizes.tensor([blocks], torch.int64, value.device)),
    ]


def _slot_of(program: Program, node: Any) -> InputSlot | None:
    return next((slot for slot, own in program.slots.items() if own is node), None)


def _input(program: Program, slot: InputSlot, value: torch.Tensor) -> Node:
    node = program.add_input(slot)
    node.meta["val"] = value
    return node
