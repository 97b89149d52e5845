"""Attention masks of a call: what each token attends to, checked and described for keys."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.keys.digest import content_digest
from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.requests.bidirectional import Range, bidirectional_ranges, last_attended
from vlcache_fx.runtime.requests.key_tokens import key_tokens
from vlcache_fx.runtime.requests.mask_view import CAUSAL, MaskView, view_of, visible
from vlcache_fx.runtime.requests.prologue import Prologue
from vlcache_fx.spec.decoder import MaskSite, MaskSpec

MAX_SUMMARIES = 256


@dataclass(frozen=True)
class MaskSummary:
    """The masks of one call.

    Attributes:
        refusal: set where a span's tokens attend to tokens after the span, and no range is known outside of
            which nothing depends on them.
        is_causal: no token attends to a later token, except within a span or a bidirectional range.
        ignores_past: no token attends to keys of earlier calls.
        padding: per sample, positions that no token attends to; None where some layer has no mask. The last
            token of a prompt is never padding: it attends to itself.
        shown_to_spans: per sample and span, what each layer's mask shows to the span's tokens, for its key.
        shown_to_tokens: per sample and token, a digest of what masks show to the token; None where all masks
            are causal, except within spans.
        bidirectional: per sample, the ranges of spans with tokens that attend beyond their span.
    """

    refusal: UnsupportedGraphError | None = None
    is_causal: bool = True
    ignores_past: bool = True
    padding: tuple[Tensor | None, ...] = ()
    shown_to_spans: tuple[tuple[str, ...], ...] = ()
    shown_to_tokens: tuple[tuple[bytes, ...] | None, ...] = ()
    bidirectional: tuple[tuple[Range, ...], ...] = ()


class MaskChecker:
    """Checks the masks of one decoder graph.

    Summaries are cached by the spans and by the inputs on which masks depend. Attention without a mask is
    causal by itself and needs a check only after keys of earlier calls.

    Args:
        spec: the attention sites to check.
        prologue: its program ``masks`` returns their masks.
        allows_ranges: bidirectional ranges may be reused.
    """

    def __init__(self, spec: MaskSpec, prologue: Prologue, *, allows_ranges: bool = True) -> None:
        self._spec, self._prologue, self._allows_ranges = spec, prologue, allows_ranges
        self._summaries: OrderedDict[str, MaskSummary] = OrderedDict()

    def check(
        self, args: Sequence[Any], host_args: Sequence[Any], num_tokens: int, spans: Sequence[Sequence[Span]]
    ) -> MaskSummary:
        """Summarize the masks of one call.

        Args:
            args: the graph's inputs.
            host_args: ``args`` with host inputs on the CPU, for the cache key.
            num_tokens: tokens of each sample.
            spans: per sample. Tokens may attend to later tokens of their own span; in a call with one sample
                also beyond, see ``bidirectional``.
        """
        if not self._spec.sites:
            return MaskSummary(
                padding=(None,) * len(spans),
                shown_to_spans=tuple((CAUSAL,) * len(own) for own in spans),
                shown_to_tokens=(None,) * len(spans),
                bidirectional=((),) * len(spans),
            )
        cached = self._prologue.cache_values(*args)
        tokens = [key_tokens(site.key_moves, num_tokens, cached) for site in self._spec.sites]
        bounds = [(span.sample, span.start, span.length) for sample in spans for span in sample]
        inputs = (host_args[index] for index in self._spec.inputs)
        key = content_digest([*inputs, *tokens, num_tokens, len(spans), *bounds])
        if key not in self._summaries:
            masks = self._evaluated(args, num_tokens, tokens)
            self._summaries[key] = self._summarize(masks, num_tokens, spans)
            if len(self._summaries) > MAX_SUMMARIES:
                self._summaries.popitem(last=False)
        return self._summaries[key]

    def _evaluated(
        self, args: Sequence[Any], num_tokens: int, tokens_of_sites: Sequence[Tensor]
    ) -> Iterator[tuple[MaskSite, Tensor, Tensor]]:
        """Yield ``(site, mask [..., rows, keys], token of each key)``."""
        masks = iter(self._prologue.masks(*args) if any(site.has_mask for site in self._spec.sites) else ())
        for site, tokens in zip(self._spec.sites, tokens_of_sites, strict=True):
            mask = (
                next(masks) if site.has_mask else torch.ones(num_tokens, len(tokens), dtype=torch.bool).tril()
            )
            if mask.dim() >= 2:
                yield site, mask, tokens.to(mask.device)

    def _summarize(
        self,
        masks: Iterator[tuple[MaskSite, Tensor, Tensor]],
        num_tokens: int,
        spans: Sequence[Sequence[Span]],
    ) -> MaskSummary:
        leak, rows_known, ignores_past = None, True, True
        attended = torch.zeros(len(spans), num_tokens, dtype=torch.bool)
        reach = torch.arange(num_tokens).repeat(len(spans), 1)
        views: list[list[MaskView]] = [[] for _ in spans]
        for site, mask, tokens in masks:
            for sample, own in enumerate(spans):
                part = mask[sample : sample + 1] if mask.dim() > 2 and mask.shape[0] > 1 else mask
                view = view_of(part, tokens, num_tokens, own, site.rule)
                views[sample].append(view)
                if view.seen is None:
                    attended[sample] = True
                    continue
                last = last_attended(view.seen)
                leaking = next((one for one in own if int(last[one.start : one.end].max()) >= one.end), None)
                if leaking is not None and leak is None:
                    detail = f"tokens of the span at {leaking.start} attend to tokens after the span"
                    leak = UnsupportedGraphError(Reason.MASK_FORM, detail, site.node, site.source_line)
                reach[sample] = torch.maximum(reach[sample], last)
                rows_known = rows_known and part.shape[-2] == num_tokens
                ignores_past = ignores_past and not bool(visible(part)[..., tokens < 0].any())
                attended[sample] |= _attended(part, tokens, num_tokens)
        # Padding in front of the samples of a batch leaves no exact prefix, and ranges need one.
        ranges = [
            bidirectional_ranges(last, own) if self._allows_ranges and len(spans) == 1 else ()
            for last, own in zip(reach, spans, strict=True)
        ]
        is_causal = rows_known and all(
            _is_causal(last, [*own, *joined]) for last, own, joined in zip(reach, spans, ranges, strict=True)
        )
        refusal = None if is_causal and ignores_past else leak
        padding = tuple(
            (~flags).nonzero().flatten() if self._spec.every_layer_has_one else None for flags in attended
        )
        per_sample = list(zip(views, spans, strict=True))
        return MaskSummary(
            refusal,
            is_causal,
            ignores_past,
            padding,
            tuple(tuple(self._shown_to_span(of_sites, span) for span in own) for of_sites, own in per_sample),
            tuple(self._shown_to_tokens(of_sites, num_tokens) for of_sites in views),
            tuple(ranges),
        )

    def _shown_to_span(self, views: Sequence[MaskView], span: Span) -> str:
        texts = [view.shown_to_span(span) for view in views]
        if all(text == CAUSAL for text in texts):
            return CAUSAL
        return str([CAUSAL if site is None else texts[site] for site in self._spec.site_of_layer])

    def _shown_to_tokens(self, views: Sequence[MaskView], num_tokens: int) -> tuple[bytes, ...] | None:
        if all(view.is_plain for view in views):
            return None
        layers = str(self._spec.site_of_layer)
        return tuple(
            bytes.fromhex(content_digest([layers, *parts]))
            for parts in zip(*(view.shown_to_tokens(num_tokens) for view in views), strict=True)
        )


def _is_causal(reach: Tensor, ranges: Sequence[Span | Range]) -> bool:
    """Return whether no token attends to a later one outside of its range."""
    horizon = torch.arange(len(reach))
    for own in ranges:
        horizon[own.start : own.end] = own.end - 1
    return bool((reach <= horizon).all())


def _attended(mask: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
    """Return flags of the tokens to which some token attends, bool [tokens]."""
    shown = visible(mask).reshape(-1, *mask.shape[-2:])
    attended = torch.zeros(num_tokens, dtype=torch.bool)
    attended[tokens[(tokens >= 0) & shown.any(dim=1).any(dim=0)].cpu()] = True
    return attended
