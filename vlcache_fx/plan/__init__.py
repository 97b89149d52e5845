"""Plans: takes spans and a policy's choice; returns the rows that each layer computes and reuses.

Policies, the runtime and the exporter import this package. It knows no graphs.
"""

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
