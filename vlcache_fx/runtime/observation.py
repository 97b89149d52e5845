"""What a call did beyond its report, for explanations: rows, spans and donors.

Collected only in the body of ``ServingState.observing``; elsewhere a call pays for one look into its context.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

from torch import Tensor

from vlcache_fx.plan.types import Plan, Span
from vlcache_fx.runtime.clock import Clock
from vlcache_fx.runtime.donors import refine
from vlcache_fx.runtime.donors.donor_dtype import length_of, slots_of
from vlcache_fx.runtime.report import Report
from vlcache_fx.runtime.requests.request import Request, Sample
from vlcache_fx.spec.slots import Difference
from vlcache_fx.store.entry import Entry

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Tokens as sorted ranges ``(start, end)``."""


@dataclass(frozen=True)
class DonorFacts:
    """What the donor of a reused span is made of.

    Attributes:
        key: its key.
        sample, start, length: the span.
        tier: tier of the store that it came from.
        contexts: number of contexts in its mean.
        dtypes: dtypes of its rows.
        rank: largest rank of the differences between its contexts; 0 without.
        nbytes: its bytes.
        is_exact: it lies in the exact prefix.
        unused_s: seconds since it was last stored or found before this call; None where unknown.
    """

    key: str
    sample: int
    start: int
    length: int
    tier: str
    contexts: int
    dtypes: tuple[str, ...]
    rank: int
    nbytes: int
    is_exact: bool = False
    unused_s: float | None = None


@dataclass(frozen=True)
class SampleObservation:
    """One prompt of a call.

    Attributes:
        num_tokens: its tokens, padding included.
        prefix: leading tokens whose rows were reused exactly.
        media: tokens of media items, also of those that are too short to be reused.
        reused: tokens of spans with a donor.
        rows: computed tokens per level, as in ``Plan``: those of each layer, and those after the last.
    """

    num_tokens: int
    prefix: int
    media: Ranges
    reused: Ranges
    rows: tuple[Ranges, ...]


@dataclass(frozen=True)
class Observation:
    """One call of a decoder graph that was planned.

    Attributes:
        report: its report.
        samples: its prompts.
        donors: donors of its reused spans.
    """

    report: Report
    samples: tuple[SampleObservation, ...]
    donors: tuple[DonorFacts, ...] = ()


@dataclass
class Observations:
    """The calls in the body of ``ServingState.observing``.

    Attributes:
        used_at: when each entry of the store was last used before the body, in seconds since the epoch.
        calls: the calls, in the order in which they ended.
        clock: times of encoders.
    """

    used_at: Mapping[str, float] = field(default_factory=dict)
    calls: list[Observation] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)

    def add(self, request: Request, plans: Sequence[Plan], report: Report) -> None:
        """Add a call."""
        samples = tuple(_sample(one, plan) for one, plan in zip(request.samples, plans, strict=True))
        donors = [facts for sample in request.samples for facts in self._donors(sample)]
        self.calls.append(Observation(report, samples, tuple(donors)))

    def _donors(self, sample: Sample) -> Iterator[DonorFacts]:
        """Yield the donors of a sample's reused spans. Entries are in the order of tokens."""
        hits = {span.start: span for span in sample.spans if span.hit}
        late = [span for start, span in hits.items() if start >= sample.prefix]
        first = len(sample.donors) - len(late)
        at = 0
        for entry in sample.donors[:first]:
            if at in hits:
                yield self._facts(hits[at], entry, is_exact=True)
            at += length_of(entry)
        for span, entry in zip(late, sample.donors[first:], strict=False):
            yield self._facts(span, entry, is_exact=False)

    def _facts(self, span: Span, entry: Entry, *, is_exact: bool) -> DonorFacts:
        used_at = self.used_at.get(span.key)
        names = slots_of(entry)
        left = [name for name in entry.tensors if name.endswith(f".{Difference.parts[0]}")]
        return DonorFacts(
            key=str(span.key),
            sample=span.sample,
            start=span.start,
            length=span.length,
            tier=span.tier or "",
            contexts=len(refine.contexts_of(entry)),
            dtypes=tuple(sorted({str(entry.peek(name).dtype).removeprefix("torch.") for name in names})),
            rank=max((entry.peek(name).shape[-1] for name in left), default=0),
            nbytes=entry.nbytes,
            is_exact=is_exact,
            unused_s=None if used_at is None else max(0.0, time.time() - used_at),
        )


def _sample(sample: Sample, plan: Plan) -> SampleObservation:
    rows = [ranges_of(plan.rows[0])]
    for before, now in pairwise(plan.rows):
        rows.append(rows[-1] if now is before else ranges_of(now))
    return SampleObservation(
        plan.num_tokens,
        sample.prefix,
        tuple((span.start, span.start + span.length) for span in sample.media_spans),
        tuple((span.start, span.end) for span in sample.spans if span.hit),
        tuple(rows),
    )


def ranges_of(tokens: Tensor) -> Ranges:
    """Return sorted tokens, int64 [n], as ranges."""
    found: list[list[int]] = []
    for token in tokens.tolist():
        if found and found[-1][1] == token:
            found[-1][1] = token + 1
        elif not found or token >= found[-1][1]:
            found.append([token, token + 1])
    return tuple((start, end) for start, end in found)
