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
from vlcache_fx.runtime.requests.key_tokens import key_tokens
from vlcache_fx.runtime.requests.mask_view import CAUSAL, MaskView, view_of, visible
from vlcache_fx.runtime.requests.prologue import Prologue
from vlcache_fx.spec.decoder import MaskSite, MaskSpec

MAX_SUMMARIES = 256


@dataclass(frozen=True)
class MaskSummary:
    """The masks of one call.

    Attributes:
        refusal: set where a span's tokens attend to tokens after the span: its rows depend on the question.
        is_causal: no token attends to a later token, except within a span.
        ignores_past: no token attends to keys of earlier calls.
        padding: per sample, positions that no token attends to; None where some layer has no mask. The last
            token of a prompt is never padding: it attends to itself.
        shown_to_spans: per sample and span, what each layer's mask shows to the span's tokens, for its key.
        shown_to_tokens: per sample and token, a digest of what masks show to the token; None where all masks
            are causal, except within spans.
    """

    refusal: UnsupportedGraphError | None = None
    is_causal: bool = True
    ignores_past: bool = True
    padding: tuple[Tensor | None, ...] = ()
    shown_to_spans: tuple[tuple[str, ...], ...] = ()
    shown_to_tokens: tuple[tuple[bytes, ...] | None, ...] = ()


class MaskChecker:
    """Checks the masks of one decoder graph.

    Summaries are cached by the spans and by the inputs on which masks depend. Attention without a mask is
    causal by itself and needs a check only after keys of earlier calls.

    Args:
        spec: the attention sites to check.
        prologue: its program ``masks`` returns their masks.
    """

    def __init__(self, spec: MaskSpec, prologue: Prologue) -> None:
        self._spec, self._prologue = spec, prologue
        self._summaries: OrderedDict[str, MaskSummary] = OrderedDict()

    def check(
        self, args: Sequence[Any], host_args: Sequence[Any], num_tokens: int, spans: Sequence[Sequence[Span]]
    ) -> MaskSummary:
        """Summarize the masks of one call.

        Args:
            args: the graph's inputs.
            host_args: ``args`` with host inputs on the CPU, for the cache key.
            num_tokens: tokens of each sample.
            spans: per sample. Tokens may attend to later tokens of their own span.
        """
        if not self._spec.sites:
            return MaskSummary(
                padding=(None,) * len(spans),
                shown_to_spans=tuple((CAUSAL,) * len(own) for own in spans),
                shown_to_tokens=(None,) * len(spans),
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
        refusal, is_causal, ignores_past = None, True, True
        attended = torch.zeros(len(spans), num_tokens, dtype=torch.bool)
        views: list[list[MaskView]] = [[] for _ in spans]
        for site, mask, tokens in masks:
            for sample, own in enumerate(spans):
                part = mask[sample : sample + 1] if mask.dim() > 2 and mask.shape[0] > 1 else mask
                view = view_of(part, tokens, num_tokens, own, site.rule)
                views[sample].append(view)
                if view.is_plain:
                    attended[sample] = True
                    continue
                leaking = next((span for span in own if _attends_beyond(part, tokens, span)), None)
                if leaking is not None and refusal is None:
                    detail = f"tokens of the span at {leaking.start} attend to tokens after the span"
                    refusal = UnsupportedGraphError(Reason.MASK_FORM, detail, site.node, site.source_line)
                is_causal = is_causal and not _attends_to_later(part, tokens, num_tokens, own)
                ignores_past = ignores_past and not bool(visible(part)[..., tokens < 0].any())
                attended[sample] |= _attended(part, tokens, num_tokens)
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


def _attends_to_later(mask: Tensor, tokens: Tensor, num_tokens: int, spans: Sequence[Span]) -> bool:
    if mask.shape[-2] != num_tokens:
        return True
    horizon = torch.arange(num_tokens, device=mask.device)
    for span in spans:
        horizon[span.start : span.end] = span.end - 1
    return bool((visible(mask) & (tokens > horizon[:, None])).any())


def _attends_beyond(mask: Tensor, tokens: Tensor, span: Span) -> bool:
    rows = mask[..., span.start : span.end, :] if mask.shape[-2] > 1 else mask
    return bool(visible(rows[..., tokens >= span.end]).any())


def _attended(mask: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
    """Return flags of the tokens to which some token attends, bool [tokens]."""
    shown = visible(mask).reshape(-1, *mask.shape[-2:])
    attended = torch.zeros(num_tokens, dtype=torch.bool)
    attended[tokens[(tokens >= 0) & shown.any(dim=1).any(dim=0)].cpu()] = True
    return attended
