"""Finds the donors of a request in the store."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vlcache_fx.errors import DamagedEntryError, Reason, StoreClosedError
from vlcache_fx.keys.entry_key import parts_of
from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.donors import refine
from vlcache_fx.runtime.donors import tables as donors
from vlcache_fx.runtime.donors.donor_dtype import is_packed
from vlcache_fx.runtime.donors.miss_log import Miss, with_eviction
from vlcache_fx.runtime.donors.states import cuts_of
from vlcache_fx.runtime.in_flight import Missing
from vlcache_fx.runtime.pace import Pace
from vlcache_fx.runtime.requests.blocks import Block, BlockSplitter
from vlcache_fx.runtime.requests.request import Request, Sample
from vlcache_fx.runtime.state import ServingState
from vlcache_fx.spec.decoder import DecoderSpec
from vlcache_fx.store.entry import Entry

LEAST_PREFIX_SHARE = 0.5
"""Least share of the prompt for which an exact prefix without a reused span is used."""

NO_WAIT = (
    Reason.RECOMPUTED_TO_RECORD,
    Reason.RECOMPUTED_TO_REFINE,
    Reason.TOO_LARGE,
    Reason.STORE_CLOSED,
    Reason.STORE_FAILED,
    Reason.NO_PREFIX,
)
"""Misses that another request that computes the same does not change."""


class DonorIndex:
    """The donors of one decoder graph.

    Args:
        spec: spec of the decoder graph.
        engine: has the store.
        pace: time of the graph's cold runs, per token.
    """

    def __init__(self, spec: DecoderSpec, engine: ServingState, pace: Pace) -> None:
        self._spec, self._engine, self._pace = spec, engine, pace
        self._splitter = BlockSplitter(spec.spans.embeddings)

    def find(self, request: Request) -> Request:
        """Return the request with its donors; call it again after waiting for one.

        A sample with an item that is worth recording, or whose first returns are computed, gets no donors.
        """
        samples, found_spans = [], []
        if not request.found:  # the first time: looking up again is no second miss
            misses = self._miss_reasons(request)
            repeated = frozenset(key for key in misses if key in self._engine.missed)
            request = replace(request, misses=misses, repeated=repeated)
        for sample in request.samples:
            found = self._find(sample.without_donors(), request, request.misses)
            miss = None
            if request.ignores_past and not found.reuse_is_exact:
                if self._is_worth_recording(found.spans, request):
                    miss = Reason.RECOMPUTED_TO_RECORD
                elif self._is_to_be_refined(found):
                    miss = Reason.RECOMPUTED_TO_REFINE
            samples.append(found if miss is None else found.without_donors())
            found_spans += [replace(span, miss=miss) if span.hit else span for span in found.spans]
        return replace(request, samples=tuple(samples), found=tuple(found_spans))

    def _miss_reasons(self, request: Request) -> dict[str, Reason]:
        """Return the reason of a miss for each span's key, given earlier calls; record this call."""
        reasons: dict[str, Reason] = {}
        for sample in request.samples:
            notes = {media_span.start: media_span.notes for media_span in sample.media_spans}
            for span in sample.spans:
                if span.key not in reasons:  # else the same item twice in a call
                    parts = {**parts_of(span.key), **notes[span.start]}
                    reasons[span.key] = self._engine.misses.note(span.key, parts)
        return reasons

    def _find(self, sample: Sample, request: Request, misses: Mapping[str, Reason]) -> Sample:
        spans, found = [], {}
        for span in sample.spans:
            entry, failure = self._get_or_reason(span.key)
            cuts = cuts_of(entry, self._spec.states, span.length) if entry and self._spec.states else ()
            block = sample.block_of(span)
            fits = entry is not None and donors.fits(entry, self._spec.rows, block.end - block.start)
            if entry is not None and fits and (cuts or not self._spec.states):
                found[block.start] = entry
                contexts = len(refine.contexts_of(entry))
                spans.append(
                    replace(
                        span,
                        hit=True,
                        tier=entry.tier or self._engine.store.tier,
                        contexts=contexts,
                        miss=None,
                        cuts=cuts,
                    )
                )
            else:
                miss = self._miss(span, block.end - block.start, entry, failure, misses[span.key])
                self._engine.misses.add(span.key, miss)
                spans.append(replace(span, miss=miss.reason, miss_detail=miss.detail))
        prefix, entries = self._exact_prefix(request, sample, found)
        spans = [self._in_prefix(sample, span, prefix) for span in spans]
        behind = {span.start for span in spans if span.hit and span.start >= prefix}
        entries += [entry for start, entry in found.items() if start in behind]
        return replace(sample, spans=tuple(spans), prefix=prefix, donors=tuple(entries))

    def _in_prefix(self, sample: Sample, span: Span, prefix: int) -> Span:
        """Return a span, given the exact prefix: it may be all that its donor can serve."""
        if span.start < prefix:
            return replace(span, contexts=1)
        if not span.hit or sample.range_of(span) is None:
            return span
        self._engine.misses.add(span.key, Miss(Reason.NO_PREFIX))
        return replace(span, hit=False, tier=None, contexts=0, miss=Reason.NO_PREFIX)

    def _miss(
        self, span: Span, length: int, entry: Entry | None, failure: Reason | None, reason: Reason
    ) -> Miss:
        """Return why a span missed whose entry has ``length`` rows. ``reason`` is that of earlier calls."""
        if failure is not None:
            return Miss(failure)
        if entry is not None:
            detail = donors.misfit(entry, self._spec.rows, length)
            return Miss(Reason.INCOMPATIBLE_ENTRY, detail or "its states of recurrent layers do not fit")
        if span.key in self._engine.unstorable:
            return Miss(Reason.TOO_LARGE)
        with self._engine.tolerating_store_errors():
            return with_eviction(reason, self._engine.store.evicted(span.key))
        return Miss(reason)

    def _get_or_reason(self, key: str) -> tuple[Entry | None, Reason | None]:
        """Return the entry of a key, and the reason if the store failed."""
        failure = Reason.STORE_FAILED
        with self._engine.tolerating_store_errors():
            try:
                return self._engine.store.get(key), None
            except StoreClosedError:
                failure = Reason.STORE_CLOSED
                raise
            except DamagedEntryError:
                failure = Reason.DAMAGED_ENTRY
                raise
        return None, failure

    def _get(self, key: str) -> Entry | None:
        return self._get_or_reason(key)[0]

    def _exact_prefix(
        self, request: Request, sample: Sample, found: Mapping[int, Entry]
    ) -> tuple[int, list[Entry]]:
        policy = self._engine.settings.current.policy
        if not sample.spans or not self._keeps_prefixes(request) or not policy.keeps_prefix:
            return 0, []

        ranges = {own.start for own in sample.bidirectional}

        def find(block: Block) -> Entry | None:
            if block.span is None and block.start not in ranges:
                return self._get(block.key)
            entry = found.get(block.start)
            if (
                block.span is not None
                and entry is not None
                and len(refine.contexts_of(entry)) > 1
                and not is_packed(entry)
            ):
                return self._get(refine.exact_key(block.key))
            return entry

        length, entries = donors.exact_prefix(
            self._splitter.of_sample(request, sample),
            find,
            self._spec.rows,
            self._spec.states,
            self._longest_prefix(request),
        )
        reuses = any(start < length for start in found)
        return (length, entries) if reuses or length >= LEAST_PREFIX_SHARE * request.num_tokens else (0, [])

    def _longest_prefix(self, request: Request) -> int | None:
        """Return the most tokens of an exact prefix; None for any.

        Recurrent layers compute all tokens behind it, two or more, and those that results need.
        """
        if not self._spec.states:
            return None
        first = request.num_tokens if request.positions is None else int(request.positions.min())
        return min(first, request.num_tokens - 2)

    def _keeps_prefixes(self, request: Request) -> bool:
        """Return True if exact prefixes may be used; batched prompts are padded, so they share none."""
        return request.is_causal and request.ignores_past and len(request.samples) == 1

    def missing(self, request: Request) -> Missing:
        """Return the donors that the request lacks, and those that it will record.

        Args:
            request: a request after ``find``.
        """
        spans = [span for span in request.found if span.miss is not None and span.miss not in NO_WAIT]
        recording = {
            sample.index for sample in request.samples if request.ignores_past and sample.reuse_is_exact
        }
        return Missing(
            {span.key for span in spans},
            {span.key for span in spans if span.sample in recording},
            self._pace.seconds(sum(span.length for span in spans)),
        )

    def _is_to_be_refined(self, sample: Sample) -> bool:
        """Return True if an item is among its first returns behind new prompts, see ``exact_returns``."""
        first = self._engine.options.exact_returns
        return any(
            span.hit
            and span.start >= sample.prefix
            and span.contexts <= first
            and self._engine.returns.of(span.key) < first
            for span in sample.spans
        )

    def _is_worth_recording(self, spans: Sequence[Span], request: Request) -> bool:
        """Return True if a span misses for the second time: its item recurs, so a cold run pays off.

        A warm run cannot record it: its tokens attend to approximate rows, so its own rows are approximate,
        and those are never stored.
        """
        missed = [span.key for span in spans if not span.hit and span.key not in self._engine.unstorable]
        for key in missed:
            self._engine.missed.add(key)
        return not request.repeated.isdisjoint(missed)
