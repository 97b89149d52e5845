"""The plan of one request: which rows (token positions) every layer computes, and which are reused."""

from vlcache_fx.plan.budget import row_allowance, token_layer_allowance
from vlcache_fx.plan.build import RowChooser, build_plan
from vlcache_fx.plan.types import Plan, Span, SpanContext

__all__ = [
    "Plan",
    "RowChooser",
    "Span",
    "SpanContext",
    "build_plan",
    "row_allowance",
    "token_layer_allowance",
]
