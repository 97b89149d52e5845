"""States of recurrent layers in donors: what is stored, what fits, and the tables that programs read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from vlcache_fx.plan.jumps import Record
from vlcache_fx.runtime.donors.states import (
    CUTS,
    Use,
    cuts_of,
    has_states,
    recorded_states,
    state_tables,
    uses_of,
)
from vlcache_fx.runtime.donors.tables import exact_prefix
from vlcache_fx.runtime.programs.lowered import PendingTensor
from vlcache_fx.runtime.requests.blocks import Block
from vlcache_fx.runtime.requests.request import Request, Sample
from vlcache_fx.spec.decoder import StateSpec
from vlcache_fx.spec.slots import Factor, Inputs, Matrix, StoredSlot, Term
from vlcache_fx.store import Entry

CHANNELS, WIDTH, HEADS, KEY, VALUE = 5, 3, 2, 4, 6
CPU = torch.device("cpu")
SPECS = (
    StateSpec(Inputs(0, 0), "float32", (1, CHANNELS, WIDTH)),
    StateSpec(Matrix(0, 0), "float32", (HEADS, KEY, VALUE)),
    StateSpec(Factor(0, 0), "float32", (None, HEADS, KEY, KEY)),
    StateSpec(Term(0, 0), "float32", (None, HEADS, KEY, VALUE)),
)


def tensors_of(num_maps: int, seed: int = 0) -> dict[str, Tensor]:
    """Return the states of a donor, with maps of ``num_maps`` records."""
    generator = torch.Generator().manual_seed(seed)
    return {
        str(spec.slot): torch.randn(
            [num_maps if size is None else size for size in spec.sizes], generator=generator
        )
        for spec in SPECS
    }


def donor(*cuts: int, seed: int = 0) -> Entry:
    """Return the donor of an item with these cuts, the last of which is its length."""
    info = {CUTS: list(cuts), "length": cuts[-1], "before": "b"}
    return Entry(tensors_of(len(cuts) - 1, seed), info)


def text(length: int, *, has_own_states: bool = True, seed: int = 9) -> Entry:
    """Return the entry of a block of text."""
    kept = tensors_of(0, seed) if has_own_states else {}
    own = {name: kept[name] for name in ("0.inputs.0", "0.matrix.0") if name in kept}
    return Entry(own, {"length": length, "before": "b"})


# What fits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(0, 7), (0, 2, 7), (0, 2, 3, 7)])
def test_cuts_of_donor(cuts: tuple[int, ...]) -> None:
    assert cuts_of(donor(*cuts), SPECS, 7) == cuts


def without(entry: Entry, name: str) -> Entry:
    return Entry({key: value for key, value in entry.tensors.items() if key != name}, entry.info)


def with_tensor(entry: Entry, name: str, tensor: Tensor) -> Entry:
    return Entry({**entry.tensors, name: tensor}, entry.info)


def with_cuts(entry: Entry, cuts: Any) -> Entry:
    return Entry(entry.tensors, {**entry.info, CUTS: cuts})


GOOD = donor(0, 2, 7)
SPOILED: dict[str, Entry] = {
    **{f"no {spec.slot}": without(GOOD, str(spec.slot)) for spec in SPECS},
    "no cuts": Entry(GOOD.tensors, {"length": 7}),
    "cuts are no list": with_cuts(GOOD, 7),
    "other start": with_cuts(GOOD, [1, 2, 7]),
    "other end": with_cuts(GOOD, [0, 2, 6]),
    "fewer maps than cuts": with_cuts(GOOD, [0, 2, 3, 7]),
    "more maps than cuts": with_cuts(GOOD, [0, 7]),
    "no maps": with_cuts(GOOD, [0]),
    "another width": with_tensor(GOOD, "0.inputs.0", torch.zeros(1, CHANNELS, WIDTH + 1)),
    "other heads": with_tensor(GOOD, "0.matrix.0", torch.zeros(HEADS + 1, KEY, VALUE)),
    "another dtype": with_tensor(GOOD, "0.factor.0", torch.zeros(2, HEADS, KEY, KEY).double()),
    "another rank": with_tensor(GOOD, "0.term.0", torch.zeros(2, HEADS, KEY)),
}


@pytest.mark.parametrize("how", SPOILED)
def test_no_cuts_of_other_entries(how: str) -> None:
    assert cuts_of(SPOILED[how], SPECS, 7) == ()


def test_has_states() -> None:
    """To continue, the state and the convolution's last inputs are needed, no map."""
    assert has_states(GOOD, SPECS)
    assert has_states(text(5), SPECS)
    assert not has_states(text(5, has_own_states=False), SPECS)
    for name, is_needed in (("0.inputs.0", True), ("0.matrix.0", True), ("0.factor.0", False)):
        assert has_states(without(GOOD, name), SPECS) is not is_needed


# What is recorded -------------------------------------------------------------------------------------------


def results_of(records: list[Record]) -> dict[StoredSlot, Tensor]:
    """Return the results of a program: the number of the record is in every element."""
    numbers = torch.arange(float(len(records)))
    found: dict[StoredSlot, Tensor] = {
        Inputs(0, 0): numbers.repeat_interleave(WIDTH).expand(1, CHANNELS, -1).contiguous()
    }
    for spec in SPECS[1:]:
        sizes = [size for size in spec.sizes if size is not None]
        found[spec.slot] = numbers.view(1, -1, 1, 1, 1).expand(1, -1, *sizes).contiguous()
    return found


def numbers_in(found: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: sorted(set(tensor.flatten().tolist())) for name, tensor in found.items()}


RECORDS = [Record(0, 4), Record(4, 6), Record(6, 11), Record(11, 27)]
"""Text, an item of two records, and a block of text."""


def test_records_maps_of_an_item() -> None:
    found, cuts = recorded_states(results_of(RECORDS), SPECS, RECORDS, 4, 11, with_maps=True)
    assert cuts == (0, 2, 7)
    assert numbers_in(found) == {
        "0.inputs.0": [2.0],
        "0.matrix.0": [2.0],
        "0.factor.0": [1.0, 2.0],
        "0.term.0": [1.0, 2.0],
    }
    entry = Entry(found, {CUTS: list(cuts), "length": 7})
    assert cuts_of(entry, SPECS, 7) == cuts


@pytest.mark.parametrize(("start", "end", "record"), [(0, 4, 0), (2, 4, 0), (11, 27, 3)])
def test_records_the_state_behind_text(start: int, end: int, record: int) -> None:
    """A record may be longer than the last block of a text."""
    found, cuts = recorded_states(results_of(RECORDS), SPECS, RECORDS, start, end, with_maps=False)
    assert cuts == ()
    assert numbers_in(found) == {"0.inputs.0": [float(record)], "0.matrix.0": [float(record)]}
    assert has_states(Entry(found, {"length": end - start}), SPECS)


@pytest.mark.parametrize("with_maps", [False, True])
def test_records_nothing_where_no_record_ends(with_maps: bool) -> None:
    found = recorded_states(results_of(RECORDS), SPECS, RECORDS, 11, 25, with_maps=with_maps)
    assert found == ({}, ())
    assert recorded_states(results_of([]), SPECS, [], 4, 11, with_maps=with_maps) == ({}, ())


# Uses and tables --------------------------------------------------------------------------------------------


def request_of(prefix: int, *donors: Entry) -> Request:
    sample = Sample(0, (), (), prefix=prefix, donors=donors)
    return Request(args=(), host_args=(), num_tokens=99, samples=(sample,), encoder_hit=None)


def test_uses_of_spans() -> None:
    first, second = donor(0, 7), donor(0, 2, 5)
    uses = uses_of(request_of(0, first, second))
    assert uses == [Use(first, is_prefix=False), Use(second, is_prefix=False)]


def test_uses_of_a_prefix() -> None:
    """The last donor of an exact prefix has its state; those before are not read."""
    head, item, tail, other = text(4), donor(0, 7), text(16), donor(0, 2, 5)
    assert uses_of(request_of(27, head, item, tail, other)) == [Use(tail, True), Use(other, False)]
    assert uses_of(request_of(11, head, item, other)) == [Use(item, True), Use(other, False)]
    assert uses_of(request_of(4, head)) == [Use(head, True)]
    assert uses_of(request_of(0)) == []


@given(
    prefix=st.sampled_from([None, "text", "item"]),
    counts=st.lists(st.integers(1, 3), max_size=3),
)
def test_tables(prefix: str | None, counts: list[int]) -> None:
    """Maps of a prefix, then of spans in order; a prefix is a map to its state, whatever stood before."""
    spans = [donor(*range(count + 1), seed=count) for count in counts]
    first = {None: [], "text": [Use(text(4), True)], "item": [Use(donor(0, 2, 7, seed=8), True)]}[prefix]
    uses = [*first, *(Use(entry, is_prefix=False) for entry in spans)]
    assume(uses)  # programs with donors alone read tables
    tables = state_tables(uses, SPECS, CPU)
    assert set(tables) == {Inputs(0, 0), Factor(0, 0), Term(0, 0)}
    want = torch.cat([use.entry.tensors["0.inputs.0"] for use in uses], -1)
    assert torch.equal(made(tables[Inputs(0, 0)]), want)
    factors = [torch.zeros(1, HEADS, KEY, KEY)] * len(first)
    terms = [use.entry.tensors["0.matrix.0"][None] for use in first]
    factors += [entry.tensors["0.factor.0"] for entry in spans]
    terms += [entry.tensors["0.term.0"] for entry in spans]
    for slot, parts in ((Factor(0, 0), factors), (Term(0, 0), terms)):
        table, want = made(tables[slot]), torch.cat(parts)
        assert torch.equal(table[: len(want)], want)
        assert len(table) == max(len(want), 2)  # compiled programs specialise on 0 and 1
        assert not table[len(want) :].any()


def made(table: Tensor | PendingTensor) -> Tensor:
    assert isinstance(table, Tensor)
    return table


def test_table_of_one_donor_is_no_copy() -> None:
    entry = donor(0, 2, 7)
    tables = state_tables([Use(entry, is_prefix=False)], SPECS, CPU)
    for slot in (Inputs(0, 0), Factor(0, 0), Term(0, 0)):
        assert made(tables[slot]).data_ptr() == entry.tensors[str(slot)].data_ptr()


def test_tables_of_a_slow_tier_wait() -> None:
    """Nothing is read before a program needs it."""
    read: list[str] = []
    tensors = dict(donor(0, 2, 7).tensors)
    waits = {name: lambda name=name: read.append(name) for name in tensors}
    entry = Entry.pending(tensors, {"length": 7}, waits, "file")
    tables = state_tables([Use(entry, is_prefix=False), Use(donor(0, 7), is_prefix=False)], SPECS, CPU)
    assert not read
    table = tables[Term(0, 0)]
    assert isinstance(table, PendingTensor)
    assert table.get().shape == (3, HEADS, KEY, VALUE)
    assert read == ["0.term.0"]


# Exact prefixes ---------------------------------------------------------------------------------------------

BLOCKS = [Block(0, 4, "t0", "b"), Block(4, 16, "t1", "b"), Block(20, 16, "t2", "b"), Block(36, 9, "t3", "b")]


def prefix_of(has: list[bool], longest: int | None = None, found: int = 4) -> int:
    """Return the tokens of the exact prefix where the blocks' entries have states, or not."""
    entries = {
        block.key: text(block.length, has_own_states=own) for block, own in zip(BLOCKS, has, strict=True)
    }
    known = [block.key for block in BLOCKS[:found]]
    length, used = exact_prefix(
        BLOCKS, lambda block: entries[block.key] if block.key in known else None, {}, SPECS, longest
    )
    assert used == [entries[block.key] for block in BLOCKS if block.end <= length]
    return length


def test_exact_prefix_ends_at_a_state() -> None:
    """States are stored at the ends of records, not behind each block."""
    assert prefix_of([True] * 4) == 45
    assert prefix_of([False, True, True, False]) == 36
    assert prefix_of([True, False, False, False]) == 4
    assert prefix_of([False] * 4) == 0
    assert prefix_of([False, True, True, True], found=3) == 36
    assert prefix_of([True] * 4, found=0) == 0


def test_exact_prefix_is_bounded() -> None:
    """Tokens that results need are computed."""
    assert prefix_of([True] * 4, longest=45) == 45
    assert prefix_of([True] * 4, longest=44) == 36
    assert prefix_of([True, False, True, True], longest=35) == 4
    assert prefix_of([True] * 4, longest=0) == 0


def test_exact_prefix_without_states() -> None:
    entry = text(4, has_own_states=False)
    assert exact_prefix(BLOCKS[:1], lambda block: entry, {}) == (4, [entry])
