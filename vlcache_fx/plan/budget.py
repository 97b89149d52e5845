"""Budgets in rows and token-layers: the definition that policies and plans share."""

from __future__ import annotations

import math

# 0.29 * 100 is 28.999999999999996 in floating point: without this, a budget would lose a whole row.
_ROUNDING = 1e-9


def row_allowance(budget: float, span_length: int) -> int:
    """Return the number of a span's rows that *every* layer may compute under ``budget`` (a share in [0, 1]).

    Rounded down, but at least one row if the budget is not zero: the earliest row carries the most reuse
    error, and a short span would otherwise get none.
    """
    if budget <= 0 or span_length <= 0:
        return 0
    return max(1, min(span_length, math.floor(budget * span_length + _ROUNDING)))


def token_layer_allowance(budget: float, span_length: int, num_layers: int) -> int:
    """Return the number of a span's token-layers allowed by ``budget``: floor(budget * length * layers).

    At least one row in all layers if the budget is not zero (see ``row_allowance``).
    """
    whole = row_allowance(budget, span_length) * num_layers
    return max(whole, math.floor(budget * span_length * num_layers + _ROUNDING))
