"""One call of a decoder graph."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlcache_fx.plan.types import Plan, Span
from vlcache_fx.runtime.clock import Clock
from vlcache_fx.runtime.identify import Run
from vlcache_fx.runtime.report import Mode, Report, SpanReport


@dataclass(frozen=True)
class Request:
    """The graph's inputs, what was found in them, and the times so far.

    Attributes:
        args: the graph's inputs.
        num_tokens: length of the prompt.
        runs: everything that merges fill.
        spans: the runs that may be reused.
        root: what keys of rows depend on beside the prompt; empty without spans.
        encoder_hit: see ``Report``.
        prefix: leading tokens that have exact donors.
        is_causal: True where no token sees a later one, but for media among themselves.
    """

    args: Sequence[Any]
    num_tokens: int
    runs: Sequence[Run]
    spans: tuple[Span, ...]
    root: str
    encoder_hit: bool | None
    clock: Clock = field(default_factory=Clock)
    prefix: int = 0
    is_causal: bool = False

    @property
    def reuse_is_exact(self) -> bool:
        """True where every reused span lies in the known prefix."""
        return not any(span.hit and span.start >= self.prefix for span in self.spans)

    def report(self, mode: Mode, reason: str | None, plan: Plan, fraction: float) -> Report:
        """The report of this call; the arguments as in ``Report``."""
        return Report(
            mode=mode,
            reason=reason,
            num_tokens=self.num_tokens,
            spans=tuple(SpanReport(s.start, s.length, s.key, s.hit, s.tier) for s in self.spans),
            rows_per_layer=plan.rows_per_layer,
            prefix_tokens=self.prefix,
            token_layer_fraction=fraction,
            encoder_hit=self.encoder_hit,
            timings_ms=dict(self.clock.elapsed_ms),
            explanations=plan.explanations,
        )
