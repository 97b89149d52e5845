"""Unpack donors inside the program."""

from typing import ClassVar

import torch

from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.spec.slots import Donor, Key, Packed

aten = torch.ops.aten


class UnpackDonors(Pass):
    """Replaces every donor table of rows by packed rows with scale and offset, and unpacks them.

    Compilers fuse this arithmetic into the splice, so a layer reads fewer bytes and no full-size copy
    exists. All rows of a table share the scales of keys: such a program takes one donor. States of recurrent
    layers are never packed.

    Args:
        dtype: dtype of packed rows. Keys in int8 have an offset, see ``runtime.donors.donor_dtype``.
    """

    name: ClassVar[str] = "unpack_donors"
    requires: ClassVar[frozenset[str]] = frozenset({"hoisted", "segments", "inputs_declared"})
    excludes: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset({"unpacked"})

    def __init__(self, dtype: torch.dtype = torch.int8) -> None:
        self.dtype = dtype

    def run(self, program: Program) -> bool:
        """Replace every input ``donor.<slot>`` by ``packed.<slot>.rows``, ``.scale`` and ``.offset``."""
        tables = {
            slot: node
            for slot, node in program.slots.items()
            if isinstance(slot, Donor) and "donor_of" in node.meta
        }
        for slot, table in tables.items():
            _, dim = table.meta["donor_of"]
            value, reader = table.meta["val"], min(table.users, default=program.graph.output_node())
            last = value.dim() - 1
            shared = dim if isinstance(slot.stored, Key) else last - (dim == last)
            sizes = [1 if at == shared else size for at, size in enumerate(value.shape)]
            rows = program.add_input(Packed(slot.stored, "rows"), value.to(self.dtype))
            scale = program.add_input(Packed(slot.stored, "scale"), value.new_empty(sizes))
            with program.graph.inserting_before(reader):
                own = program.graph.call_function(aten.to.dtype, (rows, value.dtype))
                if isinstance(slot.stored, Key) and self.dtype == torch.int8:
                    offset = program.add_input(Packed(slot.stored, "offset"), value.new_empty(sizes))
                    whole = program.graph.call_function(aten.addcmul.default, (offset, own, scale))
                else:
                    whole = program.graph.call_function(aten.mul.Tensor, (own, scale))
            own.meta["segment"] = whole.meta["segment"] = reader.meta.get("segment", "tail")
            table.replace_all_uses_with(whole)
            program.graph.erase_node(table)
            del program.slots[slot]
        return bool(tables)
