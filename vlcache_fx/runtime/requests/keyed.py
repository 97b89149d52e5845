"""The request of a call, and the keys of its spans and blocks."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vlcache_fx.keys.digest import Part, content_digest
from vlcache_fx.keys.entry_key import KEY_VERSION, EntryKey, KeyScope, parts_of
from vlcache_fx.keys.numerics import numerics
from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.clock import Clock
from vlcache_fx.runtime.donors.donor_dtype import check_device
from vlcache_fx.runtime.requests.blocks import BlockSplitter
from vlcache_fx.runtime.requests.input_values import InputValues
from vlcache_fx.runtime.requests.masks import MaskSummary
from vlcache_fx.runtime.requests.media_spans import MediaSpan
from vlcache_fx.runtime.requests.request import Request, Sample
from vlcache_fx.runtime.requests.spans import donor_key
from vlcache_fx.runtime.state import ServingState
from vlcache_fx.spec.decoder import DecoderSpec


class KeyedRequests:
    """Makes the requests of one decoder graph.

    Args:
        spec: spec of the decoder graph.
        input_values: reads the values that enter keys.
        device: device of the decoder.
        engine: has options and fingerprints.

    Raises:
        OptionError: the device does not support the option ``donor_dtype``.
    """

    def __init__(
        self, spec: DecoderSpec, input_values: InputValues, device: torch.device, engine: ServingState
    ) -> None:
        self._spec, self._input_values = spec, input_values
        self._device, self._engine = device, engine
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
        fingerprint = weights = ""
        if any(sample.spans for sample in samples):  # with text alone there is no key to compute
            fingerprint, weights = self.weights(args)
        return Request(
            args,
            host_args,
            num_tokens,
            samples,
            encoder_hit,
            clock,
            model_fingerprint=fingerprint,
            weights=weights,
            began=self._engine.clears.number,
        )

    def weights(self, args: Sequence[Any]) -> tuple[str, str]:
        """Return the fingerprint of the layers' weights at present, and of all on which rows depend.

        Raises:
            UnreadableWeightsError: the bytes of a weight cannot be read.
        """
        fingerprint = self._spec.model_fingerprint or self._fingerprint(args, self._spec.weights)
        others = self._fingerprint(args, self._spec.other_weights)
        return fingerprint, content_digest([fingerprint, others])

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
        keyed = replace(request, samples=tuple(samples), scope=scope)
        return replace(keyed, samples=tuple(self._with_range_keys(keyed, sample) for sample in samples))

    def _with_range_keys(self, request: Request, sample: Sample) -> Sample:
        """Return the sample; the spans of a bidirectional range have the key of its block."""
        if not sample.bidirectional:
            return sample
        keys = {block.start: block.key for block in self._splitter.of_sample(request, sample)}

        def keyed(span: Span) -> Span:
            own = sample.range_of(span)
            if own is None:
                return span
            key = keys[own.start]
            parts = {**parts_of(span.key), "range": content_digest([key])}
            return replace(span, key=EntryKey.of(key, parts))

        return replace(sample, spans=tuple(map(keyed, sample.spans)))
