"""Declare the sizes of a program's inputs: symbolic ones for rows and donor tables."""

from typing import Any, ClassVar

import torch
from torch.fx import Node

from vlcache_fx.analysis.axis import shape_of
from vlcache_fx.capture.fakes import FakeInputs
from vlcache_fx.passes.base import Pass, Program


class DeclareInputs(Pass):
    """Every placeholder gets a fake value of one fresh shape environment; lowerings propagate from there."""

    name: ClassVar[str] = "declare_inputs"
    requires: ClassVar[frozenset[str]] = frozenset({"facts"})
    ensures: ClassVar[frozenset[str]] = frozenset({"inputs_declared"})

    def run(self, program: Program) -> bool:
        """Set ``meta["val"]`` of the placeholders."""
        fakes = FakeInputs()
        slots = {node: slot for slot, node in program.slots.items()}
        values = {
            node: _slot_value(program, fakes, slots[node], node)
            if node in slots
            else fakes.like(node.meta["val"])
            for node in program.graph.nodes
            if node.op == "placeholder"
        }
        for node, value in values.items():
            node.meta["val"] = value
        return True


def _slot_value(program: Program, fakes: FakeInputs, slot: str, node: Node) -> Any:
    start = program.decoder.stream.boundaries[0].meta["val"]
    device = start.device
    kind, _, rest = slot.partition(".")
    batch, tokens = fakes.like(start).shape[:2]
    samples = [batch] if program.is_batched else []
    if kind == "donor":
        frontier, dim = node.meta["donor_of"]
        sizes = list(fakes.like(frontier.meta["val"]).shape)
        sizes[dim] = fakes.size("donor_rows")
        if program.decoder.batch_dims is not None:
            sizes[program.decoder.batch_dims[frontier]] = 1
        return fakes.tensor(sizes, frontier.meta["val"].dtype, device)
    if kind == "source":
        return fakes.tensor([*samples, tokens], torch.int64, device)
    if kind == "results":
        selection = program.decoder.tail_rows.selection
        assert selection is not None
        taken = shape_of(selection)[program.decoder.tail_rows.axis] if len(shape_of(selection)) == 3 else 1
        count = taken if isinstance(taken, int) else fakes.size("results")
        return fakes.tensor([*samples, count], torch.int64, device)
    level = int(rest.rpartition(".")[2]) + (kind == "keep")
    return fakes.tensor([*samples, fakes.size(f"rows_{level}")], torch.int64, device)
