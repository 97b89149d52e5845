"""The plan of one request: rows (token positions) that each layer computes, and rows that it reuses."""

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
