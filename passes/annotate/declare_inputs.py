"""Declare the sizes of a program's inputs, symbolic for rows and donor tables."""

from collections.abc import Iterable
from typing import Any, ClassVar

import sympy
import torch
from torch.fx import Node

from vlcache_fx.analysis import Site
from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.errors import SlotError
from vlcache_fx.ir.fakes import FakeInputs
from vlcache_fx.ir.sizes import expression, is_one
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.spec.slots import (
    Donor,
    InputSlot,
    Joined,
    JumpAt,
    JumpMap,
    Keep,
    Last,
    NumRows,
    Own,
    Positions,
    RecordEnd,
    RecordStart,
    Results,
    Rows,
    Source,
)


class DeclareInputs(Pass):
    """Gives every placeholder a fake value of one new shape environment, from which lowerings propagate."""

    name: ClassVar[str] = "declare_inputs"
    requires: ClassVar[frozenset[str]] = frozenset({"facts"})
    excludes: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset({"inputs_declared"})

    def run(self, program: Program) -> bool:
        """Set ``meta["val"]`` of the placeholders."""
        fakes = FakeInputs(known_sizes(program.layered.sites))
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


def known_sizes(sites: Iterable[Site]) -> dict[str, tuple[str, int]]:
    """Return symbols that equal another symbol plus a number: ``{name: (other name, number)}``.

    An attention has as many values, and columns of its mask, as keys. Tracers do not look into attention, so
    the lengths of a cache's keys, of its values and of a mask over both may have different symbols.
    """
    known: dict[sympy.Basic, tuple[sympy.Basic, int]] = {}
    for site in sites:
        keys = shape_of(site.key)[-2]
        masks = [] if site.mask is None else [size for size in shape_of(site.mask)[-1:] if not is_one(size)]
        for other in (shape_of(site.value)[-2], *masks):
            difference = sympy.sympify(expression(keys)) - sympy.sympify(expression(other))
            rules = {name: base + more for name, (base, more) in known.items()}
            while (simpler := difference.xreplace(rules)) != difference:
                difference = simpler
            pair = sorted(difference.free_symbols, key=str)
            if len(pair) != 2:
                continue
            found = [
                (name, base, int(more))
                for base, name in (pair, pair[::-1])
                for more in (difference - base + name, -difference - base + name)
                if more.is_Integer and more >= 0
            ]
            if found:
                name, base, more = found[0]
                known[name] = (base, more)
    return {str(name): (str(base), more) for name, (base, more) in known.items()}


def _slot_value(program: Program, fakes: FakeInputs, slot: InputSlot, node: Node) -> Any:
    start = program.decoder.stream.boundaries[0].meta["val"]
    batch, tokens = fakes.like(start).shape[:2]
    samples = [batch] if program.is_batched else []
    match slot:
        case Donor():
            return _donor_value(program, fakes, node)
        case JumpAt() | JumpMap():
            return fakes.tensor([*(samples or [1]), fakes.size("jumps")], torch.int64, start.device)
        case RecordStart() | RecordEnd():
            return fakes.tensor([*(samples or [1]), fakes.size("records")], torch.int64, start.device)
        case NumRows():
            return fakes.tensor(samples, torch.int64, start.device)
        case Joined(width):
            count = fakes.size(f"joined_{width}")
        case Last(width):
            count = fakes.size(f"last_{width}")
        case Source():
            count = tokens
        case Results():
            # With the symbol of the trace, which later nodes use as well.
            count = fakes.like(program.decoder.tail_rows.num_taken)
        case Rows() | Keep() | Positions() | Own():
            count = fakes.size(f"rows_{slot.row_level}")
        case _:
            raise SlotError(f"slot {slot} has no declared size")
    return fakes.tensor([*samples, count], torch.int64, start.device)


def _donor_value(program: Program, fakes: FakeInputs, node: Node) -> Any:
    device = program.decoder.stream.boundaries[0].meta["val"].device
    if "state_of" in node.meta:
        state = node.meta["state_of"]
        heads, key_width, value_width = state.recurrence.state_sizes
        last = key_width if node.meta["is_factor"] else value_width
        return fakes.tensor([fakes.size("maps"), heads, key_width, last], state.recurrence.dtype, device)
    frontier, dim = node.meta["tail_of"] if "tail_of" in node.meta else node.meta["donor_of"]
    value = frontier.meta["val"]
    sizes = list(fakes.like(value).shape)
    sizes[dim] = fakes.size(node.meta.get("size_name", "donor_rows"))
    if program.decoder.batch_dims is not None:
        sizes[program.decoder.batch_dims[frontier]] = 1
    return fakes.tensor(sizes, value.dtype, device)
