"""Names of slots: ``str`` and ``parse``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlcache_fx.errors import SlotError
from vlcache_fx.spec.slots import (
    Difference,
    Donor,
    DonorRow,
    Factor,
    Inputs,
    InputSlot,
    Joined,
    JumpAt,
    JumpMap,
    Keep,
    Key,
    Last,
    LeftDonor,
    LeftRow,
    Matrix,
    NumRows,
    Own,
    Packed,
    Positions,
    RecordEnd,
    RecordStart,
    Residual,
    Results,
    Rows,
    Slot,
    Source,
    StoredSlot,
    Term,
    Value,
)

levels = st.integers(0, 10**6)
stored = st.one_of(
    st.builds(Key, levels),
    st.builds(Value, levels),
    st.builds(Residual),
    *(st.builds(kind, levels, levels) for kind in (Inputs, Matrix, Factor, Term)),
)
inputs = st.one_of(
    st.builds(Rows, levels),
    st.builds(Keep, levels),
    st.builds(Positions, levels, levels),
    st.builds(Source, levels),
    st.builds(Results),
    *(
        st.builds(kind)
        for kind in (JumpAt, JumpMap, NumRows, RecordStart, RecordEnd, DonorRow, LeftRow, LeftDonor)
    ),
    st.builds(Joined, levels),
    st.builds(Last, levels),
    st.builds(Own, levels, levels),
    st.builds(Donor, stored),
    st.builds(Packed, stored, st.sampled_from(Packed.parts)),
    st.builds(Difference, stored, st.sampled_from(Difference.parts)),
)


@given(st.one_of(inputs, stored))
def test_parse_inverts_str(slot: Slot) -> None:
    assert Slot.parse(str(slot)) == slot


@given(inputs, stored)
def test_parse_of_a_kind(added: InputSlot, rows: StoredSlot) -> None:
    assert InputSlot.parse(str(added)) == added
    assert StoredSlot.parse(str(rows)) == rows
    with pytest.raises(SlotError, match="not StoredSlot"):
        StoredSlot.parse(str(added))
    with pytest.raises(SlotError, match="not InputSlot"):
        InputSlot.parse(str(rows))


@given(st.text())
def test_parse_any_text(text: str) -> None:
    try:
        slot = Slot.parse(text)
    except SlotError as error:
        assert repr(text) in str(error)  # noqa: PT017 (either is right)
    else:
        assert str(slot) == text


@pytest.mark.parametrize(
    ("slot", "name"),
    [
        (Rows(3), "rows.3"),
        (Keep(3), "keep.3"),
        (Positions(1, 3), "place.1.3"),
        (Source(2), "source.2"),
        (Results(), "results"),
        (Donor(Key(0)), "donor.0.k"),
        (Donor(Residual()), "donor.residual"),
        (Key(12), "12.k"),
        (Value(12), "12.v"),
        (Residual(), "residual"),
        (Inputs(3, 0), "3.inputs.0"),
        (Matrix(3, 1), "3.matrix.1"),
        (Factor(3, 0), "3.factor.0"),
        (Term(3, 0), "3.term.0"),
        (JumpAt(), "jump_at"),
        (JumpMap(), "jump_map"),
        (Joined(4), "joined.4"),
        (Own(3, 4), "own.3.4"),
        (NumRows(), "num_rows"),
        (RecordStart(), "record_start"),
        (RecordEnd(), "record_end"),
        (Last(4), "last.4"),
        (Donor(Factor(3, 0)), "donor.3.factor.0"),
    ],
)
def test_str_names(slot: Slot, name: str) -> None:
    assert str(slot) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "row.3", "rows", "rows.", "rows.x", "rows.03", "rows. 3", "rows.+3", "rows.-3", "rows.1_0",
     "keep.1.2", "place.1", "results.1", "donor", "donor.rows.1", "donor.donor.0.k", "k", "3.K", "3.k.",
     "Residual", "3.matrix", "3.matrix.", "3.matrix.x", "matrix.0", "3.matrix.0.0", "3.inputs.00", "joined",
     "joined.4.1", "own.3", "jump_at.0", "last", "donor.jump_at", "donor.joined.4"],
)  # fmt: skip
def test_parse_invalid_name(name: str) -> None:
    with pytest.raises(SlotError, match="slot"):
        Slot.parse(name)


def test_row_level() -> None:
    assert [slot.row_level for slot in (Rows(3), Keep(3), Positions(1, 3), Own(3, 4))] == [3, 4, 3, 3]


def test_kinds_are_not_equal() -> None:
    assert len({Rows(3), Keep(3), Source(3), Key(3), Value(3), Results(), Residual()}) == 7
    assert len({JumpAt(), JumpMap(), RecordStart(), RecordEnd(), Joined(3), Last(3), Own(3, 3)}) == 7
    assert len({Inputs(3, 0), Matrix(3, 0), Factor(3, 0), Term(3, 0)}) == 4
