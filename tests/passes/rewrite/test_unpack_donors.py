"""``unpack_donors``: programs take a packed donor and unpack it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vlcache_fx.passes import Program
from vlcache_fx.passes.rewrite import UnpackDonors
from vlcache_fx.passes.standard import WARM, packed_program, warm_program
from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.donors.donor_dtype import PACKED, Packing
from vlcache_fx.runtime.donors.refine import exact_donor, packed
from vlcache_fx.runtime.donors.tables import single_packed, tables
from vlcache_fx.runtime.programs.bind import bind
from vlcache_fx.spec.decoder import RowSpec
from vlcache_fx.spec.slots import Donor, Key, Packed, StoredSlot, Value

from .. import hybrids
from ..programs import (
    LENGTH,
    START,
    STARTS,
    TOKENS,
    PassCase,
    Rows,
    own_donors,
    plan_for,
    plan_for_both,
    prepared,
    small,
    two_samples,
    unchanged,
)

CPU = torch.device("cpu")
CASE = PassCase(UnpackDonors(), WARM.passes)


def test_graph(golden: Callable[[str, str], None]) -> None:
    golden("unpack_donors", CASE.change(small(rope="none")[0]))


def slots_of(program: Program) -> list[str]:
    return [str(slot) for slot in program.slots if isinstance(slot, Donor | Packed)]


def test_float8_has_no_offsets() -> None:
    program = packed_program(warm_program(small()[0]), torch.float8_e4m3fn)
    wanted = ["packed.0.k.rows", "packed.0.k.scale", "packed.0.v.rows", "packed.0.v.scale"]
    assert slots_of(program) == wanted
    assert program.slots[Packed(Key(0), "rows")].meta["val"].dtype == torch.float8_e4m3fn


def test_states_of_recurrent_layers_stay() -> None:
    program = packed_program(warm_program(hybrids.small("da")[0]), torch.int8)
    assert [name for name in slots_of(program) if name.startswith("donor")] == [
        "donor.0.inputs.0", "donor.0.factor.0", "donor.0.term.0",
    ]  # fmt: skip
    assert "packed.1.k.rows" in slots_of(program)


def test_warm_program_stays() -> None:
    warm = warm_program(small()[0])
    before = str(warm.graph)
    program = packed_program(warm, torch.int8)
    assert str(warm.graph) == before
    assert slots_of(warm) == ["donor.0.k", "donor.0.v"]
    assert program.recorded == warm.recorded
    program.check_complete()


@pytest.mark.parametrize("donor_dtype", PACKED)
@pytest.mark.parametrize("all_rows", [False, True])
@pytest.mark.parametrize("is_batched", [False, True])
def test_equals_table_bit_by_bit(donor_dtype: str, all_rows: bool, is_batched: bool) -> None:
    make = two_samples if is_batched else small
    captured, graph, _ = make(num_layers=2, last_only=not all_rows)
    warm = warm_program(captured)
    stored = own_donors(captured, graph.calls[0], STARTS if is_batched else (START,))
    specs: dict[StoredSlot, RowSpec] = {}
    for slot, node in warm.slots.items():
        if isinstance(slot, Donor):
            rows, dim = stored[slot.stored], node.meta["donor_of"][1]
            sizes = tuple(None if at == dim else size for at, size in enumerate(rows.shape))
            specs[slot.stored] = RowSpec(dim, "float32", sizes)
    named = {str(slot): rows for slot, rows in stored.items() if slot in specs}
    length = LENGTH * (2 if is_batched else 1)
    donor = packed(exact_donor(named, length, "a"), Packing(donor_dtype, specs))
    few = Rows(((1, 2), (1,)))
    plan = (
        plan_for_both(warm, few)
        if is_batched
        else plan_for(warm, TOKENS, [Span(0, START, LENGTH, "key", True)], few)
    )
    positions = warm.decoder.tail_rows.positions(TOKENS)
    alone = single_packed([donor], specs, CPU)
    assert alone is not None
    dtype, parts = alone
    results = []
    for program, found in ((warm, tables([donor], specs, CPU)), (packed_program(warm, dtype), parts)):
        bound = bind(tuple(program.slots), plan, positions, lambda found=found: found)
        values = [value if isinstance(value, torch.Tensor) else value.get() for value in bound]
        with torch.no_grad():
            results.append(program.graph_module(*graph.calls[0], *values))
    for want, got in zip(*results, strict=True):
        assert torch.equal(want, got)


def test_keeps_program_without_donors() -> None:
    assert unchanged(UnpackDonors(), prepared(small()[0], warm=False))
    assert Packed(Value(0), "rows") not in prepared(small()[0], warm=False).slots
