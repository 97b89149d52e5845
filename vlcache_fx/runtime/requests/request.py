"""One call of a decoder graph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from vlcache_fx.errors import Reason
from vlcache_fx.keys.entry_key import KeyScope
from vlcache_fx.plan.stack import StackedPlan, stack_plans
from vlcache_fx.plan.types import Plan, Span
from vlcache_fx.runtime.clock import Clock
from vlcache_fx.runtime.in_flight import Claim
from vlcache_fx.runtime.report import Mode, Report, SampleReport, SpanReport
from vlcache_fx.runtime.requests.bidirectional import Range
from vlcache_fx.runtime.requests.media_spans import MediaSpan
from vlcache_fx.store.entry import Entry

NO_SCOPE = KeyScope("", "")
"""Scope of a call without spans: it has no keys."""


@dataclass(frozen=True)
class Sample:
    """One prompt of a call, with its donors.

    Attributes:
        index: index in the batch.
        media_spans: all media spans.
        spans: those that may be reused.
        prefix: number of leading tokens with exact donors.
        padding: positions that no token attends to; None where unknown.
        donors: donors of the prefix and of the reused spans after it, in token order.
        seen: per token, a digest of what masks show to it; None where causal, see ``MaskSummary``.
        by_token: other values on which rows depend, each [tokens, ...] on the CPU.
        root: digest of all that keys of blocks cover besides the prompt; empty without spans.
        bidirectional: ranges that are reused as a whole, see ``MaskSummary``.
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
    bidirectional: tuple[Range, ...] = ()

    def range_of(self, span: Span) -> Range | None:
        """Return the bidirectional range in which a span lies; None without one."""
        return next((own for own in self.bidirectional if own.covers(span)), None)

    def block_of(self, span: Span) -> Range:
        """Return the tokens that are stored with a span: its range, or else the span itself."""
        return self.range_of(span) or Range(span.start, span.end)

    @property
    def reuse_is_exact(self) -> bool:
        """True where every reused span lies in the exact prefix."""
        return not any(span.hit and span.start >= self.prefix for span in self.spans)

    def without_donors(self) -> "Sample":
        """Return the sample without donors, to compute all rows."""
        spans = tuple(replace(span, hit=False, tier=None, contexts=0) for span in self.spans)
        return replace(self, spans=spans, prefix=0, donors=())


@dataclass(frozen=True)
class Request:
    """One call of a decoder graph: inputs, spans, donors and times so far.

    Attributes:
        args: the graph's inputs.
        host_args: ``args`` with the host inputs on the CPU, for keys.
        num_tokens: length of each prompt, padding included.
        samples: the prompts.
        encoder_hit: see ``Report``.
        is_causal: no token attends to a later token, except within a span.
        ignores_past: no token attends to keys of earlier calls. Rows that do are not stored: they depend on
            more than this prompt, and the earlier keys may be reused ones, not exact.
        model_fingerprint: fingerprint of the layers' weights; empty without spans.
        weights: fingerprint of all weights on which rows depend.
        scope: tenant and model of its keys.
        positions: tokens that results need, int64 [n], on the CPU; None for all.
        found: the spans as the store had them, before ``find`` drops donors so as to record; empty before.
        misses: per key, why it is missed if it is, given earlier calls.
        repeated: the keys that an earlier call missed.
        began: ``Clears.number`` when the call began.
        claim: what it computes for others as well.
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
    scope: KeyScope = NO_SCOPE
    positions: Tensor | None = None
    found: tuple[Span, ...] = ()
    misses: Mapping[str, Reason] = field(default_factory=dict)
    repeated: frozenset[str] = frozenset()
    began: int = 0
    claim: Claim = field(default_factory=Claim)

    @property
    def size(self) -> tuple[int, int]:
        """Number of prompts, and tokens of each."""
        return len(self.samples), self.num_tokens

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans of all samples, in order."""
        return tuple(span for sample in self.samples for span in sample.spans)

    @property
    def donors(self) -> list[Entry]:
        """The donors of all samples, in the order of their rows in donor tables."""
        return [entry for sample in self.samples for entry in sample.donors]

    def without_donors(self) -> "Request":
        """Return the request without donors, to compute all rows."""
        return replace(self, samples=tuple(sample.without_donors() for sample in self.samples))

    def with_lost_donors(self, reason: Reason) -> "Request":
        """Return the request without donors, after they were found and could not be read."""
        found = tuple(
            replace(span, hit=False, tier=None, contexts=0, miss=reason) if span.hit else span
            for span in self.found
        )
        return replace(self.without_donors(), found=found)

    def report(
        self,
        mode: Mode,
        reason: str | None,
        plans: Sequence[Plan],
        fraction: float,
        reason_code: Reason | None = None,
    ) -> Report:
        """Return the report of this call; arguments as in ``Report``, with a plan per sample."""
        return Report(
            mode=mode,
            reason=reason,
            reason_code=reason_code,
            num_tokens=self.num_tokens,
            spans=tuple(
                SpanReport(
                    s.start,
                    s.length,
                    str(s.key),
                    s.hit and s.miss is None,
                    s.tier,
                    s.sample,
                    s.contexts,
                    s.miss,
                    s.miss_detail,
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
            num_samples=len(self.samples),
            samples=self._sample_reports(mode, plans) if len(self.samples) > 1 and self.spans else (),
        )

    def _sample_reports(self, mode: Mode, plans: Sequence[Plan]) -> tuple[SampleReport, ...]:
        return tuple(
            SampleReport(
                self.num_tokens - (0 if sample.padding is None else len(sample.padding)),
                sample.prefix,
                plan.token_layer_fraction if mode == "warm" and sample.donors else 1.0,
            )
            for sample, plan in zip(self.samples, plans, strict=True)
        )

    def computed_share(self, plans: Sequence[Plan]) -> float:
        """Return the computed share of the token-layers of all reused spans."""
        tokens = [sum(span.length for span in sample.spans if span.hit) for sample in self.samples]
        computed = sum(plan.token_layer_fraction * count for plan, count in zip(plans, tokens, strict=True))
        return computed / sum(tokens) if sum(tokens) else 0.0


def stack_if_batched(plans: Sequence[Plan]) -> Plan | StackedPlan:
    """Return the plan of a single sample, or a stacked plan of several: the form that programs take."""
    return plans[0] if len(plans) == 1 else stack_plans(plans)
