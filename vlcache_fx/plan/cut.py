"""Plans that stop after a given layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlcache_fx.plan.build import kept_indices
from vlcache_fx.plan.types import Plan


def cut_after(plan: Plan, layer: int, output_rows: Tensor | None) -> Plan:
    """Return the plan with the minimum of rows after ``layer``.

    Outputs after ``layer`` are garbage. Needs at least one donor row, which stands in for rows that are not
    computed.

    Args:
        plan: of one sample of at least two tokens.
        layer: index of the last layer whose keys and values matter.
        output_rows: the argument of ``build_plan``.
    """
    few = plan.rows[-1][-2:] if output_rows is None else plan.rows[-1]  # an output selection needs its rows
    remaining = plan.num_layers - layer
    source = torch.zeros(plan.num_tokens, dtype=torch.int64)
    source[few] = torch.arange(-1, -len(few) - 1, -1)
    rows = (*plan.rows[: layer + 1], *(few,) * remaining)
    return replace(
        plan,
        rows=rows,
        keep=kept_indices(rows),
        source=(*plan.source[: layer + 1], *(source,) * remaining),
        rows_per_layer=tuple(len(tensor) for tensor in rows),
    )
