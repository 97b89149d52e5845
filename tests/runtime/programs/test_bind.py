"""Values of a program's input slots, from a plan and donor tables."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlcache_fx.errors import PlanError
from vlcache_fx.lowering import Lowered
from vlcache_fx.options import Options
from vlcache_fx.plan.jumps import Jump, Record
from vlcache_fx.plan.stack import stack_plans
from vlcache_fx.plan.types import Plan
from vlcache_fx.runtime.engine import ServingEngine
from vlcache_fx.runtime.programs.bind import bind, of_plan
from vlcache_fx.runtime.programs.run import ProgramRunner
from vlcache_fx.spec.program import ProgramSpec
from vlcache_fx.spec.slots import (
    Donor,
    InputSlot,
    Joined,
    JumpAt,
    JumpMap,
    Keep,
    Key,
    Last,
    NumRows,
    Own,
    Packed,
    Positions,
    RecordEnd,
    RecordStart,
    Residual,
    Results,
    Rows,
    Source,
)


def plan(shift: int = 0) -> Plan:
    """Two layers of six tokens; four, three and two rows."""
    rows = tuple(torch.tensor(level) + shift for level in ([0, 1, 3, 4], [1, 3, 4], [1, 4]))
    keep = (torch.tensor([1, 2, 3]), torch.tensor([0, 2]))
    source = tuple(torch.arange(6) + level for level in range(3))
    return Plan(6, rows, keep, source, (4, 3, 2), 0.5)


@pytest.mark.parametrize(
    ("slot", "want"),
    [
        (Rows(1), [1, 3, 4]),
        (Keep(0), [1, 2, 3]),
        (Positions(0, 2), [1, 3]),
        (Source(2), [2, 3, 4, 5, 6, 7]),
        (Results(), [1]),
    ],
)
def test_of_plan(slot: InputSlot, want: list[int]) -> None:
    assert of_plan(slot, plan(), torch.tensor([4])).tolist() == want


def test_of_plan_of_two_samples() -> None:
    stacked = stack_plans([plan(), plan(1)])
    assert of_plan(Rows(2), stacked, None).tolist() == [[1, 4], [2, 5]]
    assert of_plan(Positions(0, 2), stacked, None).tolist() == [[1, 3], [1, 3]]
    assert of_plan(Results(), stacked, torch.tensor([5])).tolist() == [[2], [1]]


def test_of_plan_of_two_samples_with_recurrent_layers() -> None:
    """Entry 0 of the stored inputs is zeros; two inputs of a convolution are stored."""

    def with_jumps(rows: list[int], jumps: tuple[Jump, ...], records: tuple[Record, ...]) -> Plan:
        levels = (torch.tensor(rows),) * 2
        keep, source = (torch.arange(len(rows)),), (torch.zeros(9, dtype=torch.int64),) * 2
        return Plan(9, levels, keep, source, (len(rows),) * 2, 0.5, (), jumps, records)

    long = with_jumps([0, 1, 4, 5, 8], (Jump(2, 4, (0,), 1), Jump(6, 8, (1, 2), 2)), (Record(0, 2),))
    short = with_jumps([0, 7, 8], (Jump(1, 7, (3,), 3),), ())
    stacked = stack_plans([long, short])
    found = {
        slot: of_plan(slot, stacked, None).tolist()
        for slot in (JumpAt(), JumpMap(), NumRows(), Joined(2), Own(0, 2), RecordStart(), RecordEnd())
    }
    assert found == {
        JumpAt(): [[2, 4, 4], [1, 3, 0]],
        JumpMap(): [[0, 1, 2], [3, -1, -1]],
        NumRows(): [5, 3],
        Joined(2): [[-1, -2, 2, 3, -3, -4, 4, 5, -5], [0, 0, 0, 0, -1, 6, 7, -2, -3]],
        Own(0, 2): [[0, 1, 4, 5, 8], [4, 7, 8, 8, 8]],
        RecordStart(): [[0, 0], [0, 0]],
        RecordEnd(): [[2, 0], [0, 0]],
    }
    # The first record of the first sample ends behind its second row; in front of a sample are zeros.
    assert of_plan(Last(2), stacked, None).tolist() == [[2, 3, 0, 1], [4, 5, 4, 5]]


def test_of_plan_without_positions() -> None:
    with pytest.raises(PlanError, match="no positions are given"):
        of_plan(Results(), plan(), None)


def test_of_plan_of_a_donor() -> None:
    with pytest.raises(PlanError, match=r"slot donor\.0\.k has no value in a plan"):
        of_plan(Donor(Key(0)), plan(), None)


def test_bind_keeps_slot_order() -> None:
    table = torch.ones(3)
    sent: list[Tensor] = []

    def send(tensor: Tensor) -> Tensor:
        sent.append(tensor)
        return -tensor

    slots = [Donor(Residual()), Rows(2), Keep(1)]
    bound = bind(slots, plan(), None, lambda: {Residual(): table}, send)
    assert bound[0] is table
    assert [value.tolist() for value in bound[1:] if isinstance(value, Tensor)] == [[-1, -4], [0, -2]]
    assert len(sent) == 2


def test_bind_tensors_of_packed_donor() -> None:
    slots = [Packed(Key(0), part) for part in Packed.parts]
    parts = {slot: torch.ones(1) for slot in slots}
    bound = bind([*slots, Rows(2)], plan(), None, lambda: parts)
    assert all(value is parts[slot] for value, slot in zip(bound, slots, strict=False))


def test_bind_does_not_confuse_temporaries() -> None:
    """``of_plan`` makes new tensors: a later one may get the id of an earlier one that was freed."""
    slots: list[InputSlot] = [Positions(0, 1), Positions(0, 2), Positions(1, 2), Positions(0, 0)]
    runner = ProgramRunner(
        "warm", ProgramSpec(tuple(slots), ()), _never, torch.device("meta"), ServingEngine(Options())
    )
    bound = runner.bind(plan(), None, dict)
    assert [value.shape for value in bound if isinstance(value, Tensor)] == [(3,), (2,), (2,), (4,)]


def _never() -> Lowered:
    raise AssertionError("nothing is run here")
