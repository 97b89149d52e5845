"""Finds the donors of a request in the store, and stores the rows that it records."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.errors import DamagedEntryError, Reason, StoreClosedError
from vlcache_fx.keys.digest import Part, content_digest
from vlcache_fx.keys.entry_key import KEY_VERSION, KeyScope, parts_of
from vlcache_fx.keys.numerics import numerics
from vlcache_fx.plan.types import Plan, Span
from vlcache_fx.runtime.clock import Clock
from vlcache_fx.runtime.donors import refine
from vlcache_fx.runtime.donors import tables as donors
from vlcache_fx.runtime.donors.donor_dtype import MODEL, check_device, is_packed
from vlcache_fx.runtime.donors.miss_log import Miss, with_eviction
from vlcache_fx.runtime.in_flight import Missing, Pace
from vlcache_fx.runtime.requests.blocks import Block, BlockSplitter
from vlcache_fx.runtime.requests.input_values import InputValues
from vlcache_fx.runtime.requests.masks import MaskSummary
from vlcache_fx.runtime.requests.media_spans import MediaSpan
from vlcache_fx.runtime.requests.request import Request, Sample
from vlcache_fx.runtime.requests.spans import donor_key
from vlcache_fx.runtime.state import ServingState
from vlcache_fx.spec.decoder import DecoderSpec
from vlcache_fx.spec.slots import StoredSlot
from vlcache_fx.store.entry import Entry

LEAST_PREFIX_SHARE = 0.5
"""Least share of the prompt for which an exact prefix without a reused span is used."""

NO_WAIT = (Reason.RECOMPUTED_TO_RECORD, Reason.TOO_LARGE, Reason.STORE_CLOSED, Reason.STORE_FAILED)
"""Misses that another request that computes the same does not change."""


class DonorIndex:
    """The donors of one decoder graph.

    Args:
        spec: spec of the decoder graph.
        input_values: reads the values that enter keys.
        device: device of the decoder.
        engine: has the store.

    Attributes:
        pace: time of the graph's cold runs, per token.

    Raises:
        OptionError: the device does not support the option ``donor_dtype``.
    """

    def __init__(
        self, spec: DecoderSpec, input_values: InputValues, device: torch.device, engine: ServingState
    ) -> None:
        self._spec, self._input_values = spec, input_values
        self._device, self._engine = device, engine
        self.pace = Pace()
        self._splitter = BlockSplitter(spec.spans.embeddings)
        check_device(engine.options.donor_dtype, device)

    def request(
        self,
        args: Sequence[Any],
        host_args: Sequence[Any],
        num_samples: int,
        num_tokens: int,
        media_spans: Sequence[MediaSpan],
        encoder_hit: bool | None,
        clock: Clock,
    ) -> Request:
        """Return the request for a call of the graph; its spans have no keys yet.

        Args:
            args, host_args, encoder_hit, clock, num_tokens: see ``Request``.
            num_samples: number of prompts.
            media_spans: media spans of all prompts.

        Raises:
            UnreadableWeightsError: the bytes of a weight cannot be read.
        """
        by_sample = [
            tuple(media_span for media_span in media_spans if media_span.sample == index)
            for index in range(num_samples)
        ]
        least = self._engine.options.min_span_tokens
        samples = tuple(
            Sample(
                index,
                own,
                tuple(
                    Span(index, media_span.start, media_span.length, "", False, grid=media_span.grid)
                    for media_span in own
                    if media_span.length >= least
                ),
            )
            for index, own in enumerate(by_sample)
        )
        fingerprint = others = ""
        if any(sample.spans for sample in samples):  # with text alone there is no key to compute
            fingerprint = self._spec.model_fingerprint or self._fingerprint(args, self._spec.weights)
            others = self._fingerprint(args, self._spec.other_weights)
        return Request(
            args,
            host_args,
            num_tokens,
            samples,
            encoder_hit,
            clock,
            model_fingerprint=fingerprint,
            weights=content_digest([fingerprint, others]),
            began=self._engine.clears.number,
        )

    def _fingerprint(self, args: Sequence[Any], weights: Sequence[int]) -> str:
        return self._engine.fingerprints.of([args[index] for index in weights])

    def with_keys(self, request: Request, summary: MaskSummary) -> Request:
        """Return the request with the keys of its spans and the roots of its prompts.

        Args:
            request: a request with spans.
            summary: summary of its masks.

        Raises:
            OptionError: the device does not support the option ``donor_dtype``.
        """
        check_device(self._engine.options.donor_dtype, self._device)  # options may change
        scope = KeyScope(self._engine.key_salt, request.model_fingerprint)
        common = {
            "weights": request.weights,
            "layout": self._spec.layout,
            "numerics": numerics(self._device.type),
        }
        digests = self._spec.computation
        covered = {
            True: {**common, "computation": digests.unified},
            False: {**common, "computation": digests.separate},
        }
        identities = {
            unified: content_digest([KEY_VERSION, *parts.values()]) for unified, parts in covered.items()
        }
        values = self._input_values.read(request.host_args)
        samples = []
        for sample, of_spans, of_tokens in zip(
            request.samples, summary.shown_to_spans, summary.shown_to_tokens, strict=True
        ):
            wanted = {span.start for span in sample.spans}
            media_spans = [
                media_span.with_digests() if media_span.start in wanted else media_span
                for media_span in sample.media_spans
            ]
            by_start = {media_span.start: media_span for media_span in media_spans}
            spans = []
            for span, text in zip(sample.spans, of_spans, strict=True):
                is_unified, parts = self._input_values.of_item(
                    values, sample.index, span.start, span.length, request.num_tokens
                )
                own: dict[str, Part] = {**covered[is_unified], "mask": text, "positions": tuple(parts)}
                own["stored_as"] = self._engine.options.donor_dtype
                key = donor_key(by_start[span.start], own, scope)
                spans.append(replace(span, key=key))
            is_unified, by_token, whole = self._input_values.of_prompt(
                values, sample.index, request.num_tokens
            )
            samples.append(
                replace(
                    sample,
                    media_spans=tuple(media_spans),
                    spans=tuple(spans),
                    seen=of_tokens,
                    by_token=by_token,
                    root=content_digest([identities[is_unified], scope.salt, whole]),
                )
            )
        return replace(
            request,
            samples=tuple(samples),
            scope=scope,
        )

    def find(self, request: Request) -> Request:
        """Return the request with its donors; call it again after waiting for one.

        A sample with an item that is worth recording gets no donors: all its rows are computed.
        """
        samples, found_spans = [], []
        if not request.found:  # the first time: looking up again is no second miss
            misses = self._miss_reasons(request)
            repeated = frozenset(key for key in misses if key in self._engine.missed)
            request = replace(request, misses=misses, repeated=repeated)
        for sample in request.samples:
            found = self._find(sample.without_donors(), request, request.misses)
            records = (
                request.ignores_past
                and not found.reuse_is_exact
                and self._is_worth_recording(found.spans, request)
            )
            samples.append(found.without_donors() if records else found)
            miss = Reason.RECOMPUTED_TO_RECORD if records else None
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
            if entry is not None and donors.fits(entry, self._spec.rows, span.length):
                found[span.start] = entry
                contexts = len(refine.contexts_of(entry))
                spans.append(
                    replace(
                        span,
                        hit=True,
                        tier=entry.tier or self._engine.store.tier,
                        contexts=contexts,
                        miss=None,
                    )
                )
            else:
                miss = self._miss(span, entry, failure, misses[span.key])
                self._engine.misses.add(span.key, miss)
                spans.append(replace(span, miss=miss.reason, miss_detail=miss.detail))
        prefix, entries = self._exact_prefix(request, sample, found)
        entries += [entry for start, entry in found.items() if start >= prefix]
        spans = [replace(span, contexts=1) if span.start < prefix else span for span in spans]
        return replace(sample, spans=tuple(spans), prefix=prefix, donors=tuple(entries))

    def _miss(self, span: Span, entry: Entry | None, failure: Reason | None, reason: Reason) -> Miss:
        """Return why a span missed. ``reason`` is that of earlier calls."""
        if failure is not None:
            return Miss(failure)
        if entry is not None:
            return Miss(Reason.INCOMPATIBLE_ENTRY, donors.misfit(entry, self._spec.rows, span.length))
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

        def find(block: Block) -> Entry | None:
            entry = self._get(block.key) if block.span is None else found.get(block.start)
            if (
                block.span is not None
                and entry is not None
                and len(refine.contexts_of(entry)) > 1
                and not is_packed(entry)
            ):
                return self._get(refine.exact_key(block.key))
            return entry

        length, entries = donors.exact_prefix(self._blocks(request, sample), find, self._spec.rows)
        reuses = any(start < length for start in found)
        return (length, entries) if reuses or length >= LEAST_PREFIX_SHARE * request.num_tokens else (0, [])

    def _keeps_prefixes(self, request: Request) -> bool:
        """Return True if exact prefixes may be used; batched prompts are padded, so they share none."""
        return request.is_causal and request.ignores_past and len(request.samples) == 1

    def _blocks(self, request: Request, sample: Sample) -> Iterable[Block]:
        blocks = self._splitter.blocks(
            request.args,
            sample.by_token,
            sample.media_spans,
            sample.spans,
            request.num_tokens,
            sample.root,
            request.scope,
            sample.seen,
            sample.index,
        )
        if len(request.samples) == 1:
            return blocks
        # The context of an item after padding differs from that after the same text alone.
        return [
            replace(block, before=content_digest(["batch", block.before]))
            for block in blocks
            if block.span is not None
        ]

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
            self.pace.seconds(sum(span.length for span in spans)),
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

    def admit(
        self, request: Request, recorded: Mapping[StoredSlot, Tensor], plans: Sequence[Plan]
    ) -> set[str]:
        """Store the rows after the exact prefix, for samples whose rows are all exact.

        Returns:
            The keys of spans whose donors are stored.
        """
        admitted: set[str] = set()
        if not request.ignores_past:
            return admitted
        for sample, plan in zip(request.samples, plans, strict=True):
            if not sample.reuse_is_exact or sample.prefix == request.num_tokens:
                continue
            for block in self._kept_blocks(request, sample):
                with self._engine.tolerating_store_errors():
                    if self._engine.clears.covers(block.key, request.began):
                        continue
                    if block.start >= sample.prefix and self._is_wanted(block, request):
                        store, index = self._engine.store, sample.index
                        contexts = self._engine.options.donor_contexts
                        stored = donors.admit(
                            store,
                            block,
                            recorded,
                            self._spec.rows,
                            plan,
                            index,
                            contexts,
                            self._engine.options.donor_dtype,
                            cost_ms=self.pace.cost_ms(block.length),
                        )
                        keys = [block.key] if block.span is None else [block.key, refine.exact_key(block.key)]
                        if self._engine.drop_if_cleared(keys, request.began) or block.span is None:
                            continue
                        if stored:
                            admitted.add(block.key)
                        else:
                            self._engine.unstorable.add(block.key)
        return admitted

    def _kept_blocks(self, request: Request, sample: Sample) -> Iterable[Block]:
        """Yield the blocks that later requests can find; text after a packed donor is in no exact prefix."""
        packs, is_exact = self._engine.options.donor_dtype != MODEL, True
        for block in self._blocks(request, sample):
            if is_exact or block.span is not None:
                yield block
            is_exact = is_exact and not (packs and block.span is not None)

    def _is_wanted(self, block: Block, request: Request) -> bool:
        """Return True for spans, whose donor may be of another context, and for new blocks of text."""
        return block.span is not None or (request.is_causal and block.key not in self._engine.store)
