"""Binds the inputs that passes add to a program: values from a plan and donor tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.errors import PlanError
from vlcache_fx.plan.jumps import joined, jump_at, last, own, record_bounds
from vlcache_fx.plan.stack import StackedPlan, stack_padded
from vlcache_fx.plan.types import Plan
from vlcache_fx.runtime.programs.lowered import PendingTensor
from vlcache_fx.spec.slots import (
    Difference,
    Donor,
    DonorRow,
    InputSlot,
    Joined,
    JumpAt,
    JumpMap,
    Keep,
    Last,
    LeftDonor,
    LeftRow,
    NumRows,
    Own,
    Packed,
    Positions,
    RecordEnd,
    RecordStart,
    Results,
    Rows,
    Source,
)

Tables = Callable[[], Mapping[Any, Tensor | PendingTensor]]
"""Returns the donor table of each stored slot; or, where a program unpacks its donor, the donor's tensors.
Where it fits donors, also what ``runtime.donors.fitting`` binds."""

OF_DONORS = (Donor, Packed, Difference, DonorRow, LeftRow, LeftDonor)
"""Slots whose values are in the tables; those of the others come from plans."""


def bind(
    slots: Sequence[InputSlot],
    plan: Plan | StackedPlan,
    positions: Tensor | None,
    tables: Tables,
    send: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[Tensor | PendingTensor]:
    """Return a value per slot, in order.

    Args:
        slots: input slots of the program.
        plan: plan of all samples of the call.
        positions: token positions that results need, int64 [n]; None for all.
        tables: called after all tensors of the plan were sent. Copies to a device are queued: otherwise the
            first layer would wait for the donors of all layers.
        send: copies a tensor of the plan to the program's device.

    Raises:
        PlanError: the program has a slot ``results``, and ``positions`` is None.
    """
    sent: dict[InputSlot, Tensor] = {}
    for slot in map(_shared, slots):
        if slot not in sent and not isinstance(slot, OF_DONORS):
            sent[slot] = send(of_plan(slot, plan, positions))
    found = tables()
    values = []
    for slot in slots:
        match slot:
            case Donor(stored):
                values.append(found[stored])
            case _ if isinstance(slot, OF_DONORS):
                values.append(found[slot])
            case _:
                values.append(sent[_shared(slot)])
    return values


def _shared(slot: InputSlot) -> InputSlot:
    """Return the slot that has the same value: recurrent decoders compute the same rows in all layers."""
    return Own(0, slot.width) if isinstance(slot, Own) else slot


def of_plan(slot: InputSlot, plan: Plan | StackedPlan, positions: Tensor | None) -> Tensor:
    """Return a slot's value from a plan, int64 on the CPU; see ``bind``."""
    match slot:
        case Rows(level):
            return plan.rows[level]
        case Keep(level):
            return plan.keep[level]
        case Source(level):
            return plan.source[level]
        case Positions(made_at, read_at):
            return torch.searchsorted(plan.rows[made_at], plan.rows[read_at])
        case Results():
            if positions is None:
                raise PlanError("the program needs the positions of results, but no positions are given")
            last = plan.rows[-1]
            return torch.searchsorted(last, positions.expand(*last.shape[:-1], -1).contiguous())
    return _of_jumps(slot, plan) if isinstance(plan, Plan) else _of_batch(slot, plan)


def _of_batch(slot: InputSlot, stacked: StackedPlan) -> Tensor:
    """Stack the samples' values; of convolutions, with the zeros of entry 0 in front."""
    plans = stacked.plans
    if isinstance(slot, NumRows):
        return torch.tensor([len(plan.rows[0]) for plan in plans])
    values = [_of_jumps(slot, plan).flatten() for plan in plans]
    match slot:
        case Joined():
            return stack_padded(values, 0, in_front=True)
        case Own(_, width) | Last(width):
            lengths = [len(plan.rows[0]) + width * len(plan.jumps) for plan in plans]
            values = [value + max(lengths) - own for value, own in zip(values, lengths, strict=True)]
            return stack_padded(values)
        case JumpMap():
            return stack_padded(values, -1)
        case _:
            return stack_padded(values, 0)


def _of_jumps(slot: InputSlot, plan: Plan) -> Tensor:
    rows, jumps, records = plan.rows[0], plan.jumps, plan.records
    match slot:
        case JumpAt():
            return jump_at(jumps, rows)[0]
        case JumpMap():
            return jump_at(jumps, rows)[1]
        case Joined(width):
            return joined(jumps, rows, width)
        case Own(_, width):
            return own(jumps, rows, width)
        case RecordStart():
            return record_bounds(records, rows)[0]
        case RecordEnd():
            return record_bounds(records, rows)[1]
        case Last(width):
            return last(records, jumps, rows, width)
    raise PlanError(f"slot {slot} has no value in a plan")
