"""One call of a decoder graph."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from vlcache_fx.errors import Reason
from vlcache_fx.plan.stack import StackedPlan, stack_plans
from vlcache_fx.plan.types import Plan, Span
from vlcache_fx.runtime.clock import Clock
from vlcache_fx.runtime.report import Mode, Report, SpanReport
from vlcache_fx.runtime.requests.media_spans import MediaSpan
from vlcache_fx.store.entry import Entry


@dataclass(frozen=True)
class Sample:
    """One prompt of a call, and what the store has for it.

    Attributes:
        index: its place in the batch.
        media_spans: all of its media spans.
        spans: those that may be reused.
        prefix: leading tokens that have exact donors.
        padding: positions that no token attends to; None where unknown.
        donors: the donors of its prefix and of the spans behind it, in the order of their tokens.
        seen: per token, a digest of what masks let it see; None where that is every token before it.
        by_token: what else its rows depend on, each [tokens, ...] on the CPU.
        root: what keys of its rows depend on beside the prompt; empty without spans.
    """

    index: int
    media_spans: tuple[MediaSpan, ...]
    spans: tuple[Span, ...]
    prefix: int = 0
    padding: Tensor | None = None
    donors: tuple[Entry, ...] = ()
    seen: tuple[bytes, ...] | None = None
    by_token: tuple[Tensor, ...] = ()
    root: str = ""

    @property
    def reuse_is_exact(self) -> bool:
        """True where every reused span lies in the known prefix."""
        return not any(span.hit and span.start >= self.prefix for span in self.spans)

    def without_donors(self) -> "Sample":
        """The same, to be computed in full."""
        spans = tuple(replace(span, hit=False, tier=None, contexts=0) for span in self.spans)
        return replace(self, spans=spans, prefix=0, donors=())


@dataclass(frozen=True)
class Request:
    """The graph's inputs, what was found in them, and the times so far.

    Attributes:
        args: the graph's inputs.
        host_args: ``args`` with the host inputs on the CPU, for keys.
        num_tokens: length of each prompt, padding included.
        samples: one per prompt.
        encoder_hit: see ``Report``.
        is_causal: no token attends to a later token, except within a span.
        ignores_past: no token attends to keys of earlier calls. Rows that do are not stored: they depend on
            more than this prompt, and the earlier keys may be reused ones, not exact.
        model_fingerprint: of the weights of the decoder's layers; empty without spans.
        weights: fingerprint of all weights that rows depend on.
        identity: of how rows are computed: by what, with which weights and global state.
        positions: tokens that results need, int64 [n], on the CPU; None for all.
        found: the spans as they were looked up, with the donors that the call leaves aside; empty before.
    """

    args: Sequence[Any]
    host_args: Sequence[Any]
    num_tokens: int
    samples: tuple[Sample, ...]
    encoder_hit: bool | None
    clock: Clock = field(default_factory=Clock)
    is_causal: bool = False
    ignores_past: bool = True
    model_fingerprint: str = ""
    weights: str = ""
    identity: str = ""
    positions: Tensor | None = None
    found: tuple[Span, ...] = ()

    @property
    def spans(self) -> tuple[Span, ...]:
        """Those of all samples, in order."""
        return tuple(span for sample in self.samples for span in sample.spans)

    @property
    def donors(self) -> list[Entry]:
        """Those of all samples, in order: the rows of the donor table."""
        return [entry for sample in self.samples for entry in sample.donors]

    def without_donors(self) -> "Request":
        """The same, to be computed in full."""
        return replace(self, samples=tuple(sample.without_donors() for sample in self.samples))

    def report(
        self,
        mode: Mode,
        reason: str | None,
        plans: Sequence[Plan],
        fraction: float,
        reason_code: Reason | None = None,
    ) -> Report:
        """The report of this call; the arguments as in ``Report``, with a plan per sample."""
        return Report(
            mode=mode,
            reason=reason,
            reason_code=reason_code,
            num_tokens=self.num_tokens,
            spans=tuple(
                SpanReport(
                    s.start,
                    s.length,
                    s.key,
                    s.hit and s.miss is None,
                    s.tier,
                    s.sample,
                    s.contexts,
                    s.miss,
                )
                for s in self.found or self.spans
            ),
            rows_per_layer=stack_if_batched(plans).rows_per_layer,
            prefix_tokens=max(sample.prefix for sample in self.samples),
            token_layer_fraction=fraction,
            encoder_hit=self.encoder_hit,
            timings_ms=dict(self.clock.elapsed_ms),
            explanations=tuple(note for plan in plans for note in plan.explanations),
            model_fingerprint=self.model_fingerprint,
        )

    def computed_share(self, plans: Sequence[Plan]) -> float:
        """The computed share of all reused spans' token-layers."""
        tokens = [sum(span.length for span in sample.spans if span.hit) for sample in self.samples]
        computed = sum(plan.token_layer_fraction * count for plan, count in zip(plans, tokens, strict=True))
        return computed / sum(tokens) if sum(tokens) else 0.0


def stack_if_batched(plans: Sequence[Plan]) -> Plan | StackedPlan:
    """Return the plan of a single sample, or a stacked plan of several: the form that programs take."""
    return plans[0] if len(plans) == 1 else stack_plans(plans)
