"""A plan that ends early."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlcache_fx.plan.build import kept_indices
from vlcache_fx.plan.types import Plan


def cut_after(plan: Plan, layer: int, output_rows: Tensor | None) -> Plan:
    """The same rows for keys and values up to ``layer``, and as few as programs run on behind it.

    What is computed behind ``layer`` then means nothing, the outputs included. Donors must be there, at least
    one row: it stands in for what is not computed.

    Args:
        plan: of one sample of at least two tokens.
        layer: index of the last layer whose keys and values matter.
        output_rows: as the plan was built with.
    """
    few = plan.rows[-1][-2:] if output_rows is None else plan.rows[-1]  # no fewer than a selection takes
    behind = plan.num_layers - layer
    source = torch.zeros(plan.num_tokens, dtype=torch.int64)
    source[few] = torch.arange(-1, -len(few) - 1, -1)
    rows = (*plan.rows[: layer + 1], *(few,) * behind)
    return replace(
        plan,
        rows=rows,
        keep=kept_indices(rows),
        source=(*plan.source[: layer + 1], *(source,) * behind),
        rows_per_layer=tuple(len(tensor) for tensor in rows),
    )
