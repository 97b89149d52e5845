"""Values of a program's input slots, from a plan and donor tables."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlcache_fx.errors import PlanError
from vlcache_fx.lowering import Lowered
from vlcache_fx.options import Options
from vlcache_fx.plan.stack import stack_plans
from vlcache_fx.plan.types import Plan
from vlcache_fx.runtime.engine import ServingEngine
from vlcache_fx.runtime.programs.bind import bind, of_plan
from vlcache_fx.runtime.programs.run import ProgramRunner
from vlcache_fx.spec.program import ProgramSpec
from vlcache_fx.spec.slots import (
    Donor,
    InputSlot,
    Keep,
    Key,
    Packed,
    Positions,
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
