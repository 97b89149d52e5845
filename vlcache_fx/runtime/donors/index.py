"""Finds the donors of a request in the store, and stores the rows that it records."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.errors import Reason, StoreClosedError
from vlcache_fx.keys.digest import Part, content_digest
from vlcache_fx.keys.entry_key import KEY_VERSION, KeyScope
from vlcache_fx.keys.numerics import numerics
from vlcache_fx.plan.types import Plan, Span
from vlcache_fx.runtime.clock import Clock
from vlcache_fx.runtime.costs import RunCost
from vlcache_fx.runtime.donors import refine
from vlcache_fx.runtime.donors import tables as donors
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


class DonorIndex:
    """The donors of one decoder graph.

    Args:
        spec: spec of the decoder graph.
        input_values: reads the values that enter keys.
        device: device of the decoder.
        engine: has the store.

    Attributes:
        cost: time of the graph's cold runs, per token.
    """

    def __init__(
        self, spec: DecoderSpec, input_values: InputValues, device: torch.device, engine: ServingState
    ) -> None:
        self._spec, self._input_values = spec, input_values
        self._device, self._engine = device, engine
        self.cost = RunCost()
        self._splitter = BlockSplitter(spec.spans.embeddings)

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
        )

    def _fingerprint(self, args: Sequence[Any], weights: Sequence[int]) -> str:
        return self._engine.fingerprints.of([args[index] for index in weights])

    def with_keys(self, request: Request, summary: MaskSummary) -> Request:
        """Return the request with the keys of its spans and the roots of its prompts.

        Args:
            request: a request with spans.
            summary: summary of its masks.
        """
        scope = KeyScope(self._engine.options.key_salt, request.model_fingerprint)
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
            identity=identities[True],
            scope=scope,
        )

    def find(self, request: Request) -> Request:
        """Return the request with its donors.

        A sample with an item that is worth recording gets no donors: all its rows are computed.
        """
        samples, found_spans = [], []
        misses = self._miss_reasons(request)
        for sample in request.samples:
            found = self._find(sample, request, misses)
            records = (
                request.ignores_past and not found.reuse_is_exact and self._is_worth_recording(found.spans)
            )
            samples.append(found.without_donors() if records else found)
            miss = Reason.RECOMPUTED_TO_RECORD if records else None
            found_spans += [replace(span, miss=miss) if span.hit else span for span in found.spans]
        return replace(request, samples=tuple(samples), found=tuple(found_spans))

    def _miss_reasons(self, request: Request) -> dict[str, Reason]:
        """Return the reason of a miss for each span's key, given earlier calls; record this call."""
        reasons: dict[str, Reason] = {}
        for sample in request.samples:
            by_start = {media_span.start: media_span for media_span in sample.media_spans}
            for span in sample.spans:
                if span.key in reasons:
                    continue  # the same item twice in a call
                was_looked_up = self._engine.contents.add(span.key, request.identity)
                earlier_weights = self._engine.contents.add(
                    content_digest(by_start[span.start].digests), request.identity
                )
                if span.key in self._engine.unstorable:
                    reasons[span.key] = Reason.TOO_LARGE
                elif was_looked_up:
                    reasons[span.key] = Reason.NOT_RECORDED
                elif earlier_weights and request.identity not in earlier_weights:
                    reasons[span.key] = Reason.OTHER_WEIGHTS
                else:
                    reasons[span.key] = Reason.NEW_ITEM
        return reasons

    def _find(self, sample: Sample, request: Request, misses: Mapping[str, Reason]) -> Sample:
        spans, found = [], {}
        for span in sample.spans:
            entry, failure = self._get_or_reason(span.key)
            if entry is not None and donors.fits(entry, self._spec.rows, span.length):
                found[span.start] = entry
                contexts = len(refine.contexts_of(entry))
                spans.append(
                    replace(span, hit=True, tier=entry.tier or self._engine.store.tier, contexts=contexts)
                )
            else:
                reason = misses[span.key] if entry is None else Reason.INCOMPATIBLE_ENTRY
                spans.append(replace(span, miss=failure or reason))
        prefix, entries = self._exact_prefix(request, sample, found)
        entries += [entry for start, entry in found.items() if start >= prefix]
        spans = [replace(span, contexts=1) if span.start < prefix else span for span in spans]
        return replace(sample, spans=tuple(spans), prefix=prefix, donors=tuple(entries))

    def _get_or_reason(self, key: str) -> tuple[Entry | None, Reason | None]:
        """Return the entry of a key, and the reason if the store failed."""
        failure = Reason.STORE_FAILED
        with self._engine.tolerating_store_errors():
            try:
                return self._engine.store.get(key), None
            except StoreClosedError:
                failure = Reason.STORE_CLOSED
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
            if block.span is not None and entry is not None and len(refine.contexts_of(entry)) > 1:
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

    def _is_worth_recording(self, spans: Sequence[Span]) -> bool:
        """Return True if a span misses for the second time: its item recurs, so a cold run pays off.

        A warm run cannot record it: its tokens attend to approximate rows, so its own rows are approximate,
        and those are never stored.
        """
        missed = [span.key for span in spans if not span.hit and span.key not in self._engine.unstorable]
        repeated = [self._engine.missed.add(key) for key in missed]
        return any(repeated)

    def admit(self, request: Request, recorded: Mapping[StoredSlot, Tensor], plans: Sequence[Plan]) -> None:
        """Store the rows after the exact prefix, for samples whose rows are all exact."""
        if not request.ignores_past:
            return
        for sample, plan in zip(request.samples, plans, strict=True):
            if not sample.reuse_is_exact or sample.prefix == request.num_tokens:
                continue
            for block in self._blocks(request, sample):
                with self._engine.tolerating_store_errors():
                    if block.start >= sample.prefix and self._is_wanted(block, request):
                        store, index = self._engine.store, sample.index
                        contexts = self._engine.options.donor_contexts
                        cost_ms = self.cost.of(block.length)
                        stored = donors.admit(
                            store,
                            block,
                            recorded,
                            self._spec.rows,
                            plan,
                            index,
                            contexts,
                            cost_ms=cost_ms,
                        )
                        if not stored and block.span is not None:
                            self._engine.unstorable.add(block.key)

    def _is_wanted(self, block: Block, request: Request) -> bool:
        """Return True for spans, whose donor may be of another context, and for new blocks of text."""
        return block.span is not None or (request.is_causal and block.key not in self._engine.store)
