"""Rows and token-layers that a budget allows: the definition that policies and plans share."""

from __future__ import annotations

import math

# 0.29 * 100 is 28.999999999999996 in floating point: without this, a budget would lose a whole row.
_ROUNDING = 1e-9


def row_allowance(budget: float, span_length: int) -> int:
    """Rows of a span that may be computed in *every* layer under ``budget`` (a share in [0, 1]).

    Rounded down, so that the share is kept; but at least one row when the budget is not zero, because the
    earliest row carries the most reuse error and a short span would otherwise get nothing.
    """
    if budget <= 0 or span_length <= 0:
        return 0
    return max(1, min(span_length, math.floor(budget * span_length + _ROUNDING)))


def token_layer_allowance(budget: float, span_length: int, num_layers: int) -> int:
    """Token-layers of a span that may be computed under ``budget``: floor(budget * length * layers).

    At least one row through all layers when the budget is not zero (see ``row_allowance``).
    """
    whole = row_allowance(budget, span_length) * num_layers
    return max(whole, math.floor(budget * span_length * num_layers + _ROUNDING))
