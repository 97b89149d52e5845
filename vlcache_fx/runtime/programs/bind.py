"""The values of the inputs that passes add to a program: made of a plan and of donor tables."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vlcache_fx.errors import PlanError
from vlcache_fx.plan.stack import StackedPlan
from vlcache_fx.plan.types import Plan
from vlcache_fx.runtime.programs.lowered import PendingTensor
from vlcache_fx.spec.slots import Donor, InputSlot, Keep, Positions, Results, Rows, Source, StoredSlot

Tables = Callable[[], Mapping[StoredSlot, Tensor | PendingTensor]]
"""Makes the donor tables."""


def bind(
    slots: Sequence[InputSlot],
    plan: Plan | StackedPlan,
    positions: Tensor | None,
    tables: Tables,
    send: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[Tensor | PendingTensor]:
    """A value per slot, in order.

    Args:
        slots: of the program.
        plan: of this call, of all its samples.
        positions: absolute token positions that results need, int64 [n]; None for all.
        tables: called last, after all tensors of the plan were sent: copies to a device queue up, and the
            first layer would wait for its rows until the donors of all layers are there.
        send: copies a tensor of the plan to the program's device.

    Raises:
        PlanError: the program has results that take single tokens, and ``positions`` is None.
    """
    sent = {slot: send(of_plan(slot, plan, positions)) for slot in slots if not isinstance(slot, Donor)}
    made = tables()
    return [made[slot.stored] if isinstance(slot, Donor) else sent[slot] for slot in slots]


def of_plan(slot: InputSlot, plan: Plan | StackedPlan, positions: Tensor | None) -> Tensor:
    """What a plan says of a slot, int64 on the CPU; see ``bind``."""
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
                raise PlanError("the program's results take single tokens, and no positions are given")
            last = plan.rows[-1]
            return torch.searchsorted(last, positions.expand(*last.shape[:-1], -1).contiguous())
    raise PlanError(f"slot {slot} is not made of a plan")
