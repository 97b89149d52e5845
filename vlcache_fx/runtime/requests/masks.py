"""What the attention masks of a call let its tokens see: tokens behind them, and keys of earlier calls."""

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

LOOKS_REMEMBERED = 256


@dataclass(frozen=True)
class MaskLook:
    """What the masks of one call let tokens see.

    Attributes:
        refusal: a span's tokens attend to tokens behind it, so their K and V belong to one question alone.
        hides_what_follows: no token attends to a later one, but for tokens of one span among themselves.
        hides_the_past: no token attends to a key that this call did not make: the rest of a cache is empty.
        unseen: per sample, positions that no token attends to; None where some layer has no mask. A prompt's
            last token is none of them: it attends to itself.
        of_items: per sample and span, what masks let the span's tokens see, layer by layer: part of its key.
        of_tokens: per sample, a digest for each token of what masks let it see; None where that is every
            token before it, or within its span.
    """

    refusal: UnsupportedGraphError | None = None
    hides_what_follows: bool = True
    hides_the_past: bool = True
    unseen: tuple[Tensor | None, ...] = ()
    of_items: tuple[tuple[str, ...], ...] = ()
    of_tokens: tuple[tuple[bytes, ...] | None, ...] = ()


class MaskCheck:
    """The masks of one decoder graph.

    They are evaluated again for every call whose masks may differ: whose inputs to them or spans do.
    Attentions without a mask hide later tokens by themselves, and are looked at only where they have keys of
    earlier calls.

    Args:
        spec: which masks there are.
        prologue: gives their values.
    """

    def __init__(self, spec: MaskSpec, prologue: Prologue) -> None:
        self._spec, self._prologue = spec, prologue
        self._looks: OrderedDict[str, MaskLook] = OrderedDict()

    def look(
        self, args: Sequence[Any], known: Sequence[Any], num_tokens: int, spans: Sequence[Sequence[Span]]
    ) -> MaskLook:
        """What tokens see in one call.

        Args:
            args: the graph's inputs.
            known: the same, for the key of what was seen: on the CPU where they are needed there anyway.
            num_tokens: of each sample.
            spans: per sample. Images may look both ways inside themselves, not behind them.
        """
        if not self._spec.sites:
            return MaskLook(
                unseen=(None,) * len(spans),
                of_items=tuple((CAUSAL,) * len(own) for own in spans),
                of_tokens=(None,) * len(spans),
            )
        cached = self._prologue.cache_values(*args)
        tokens = [key_tokens(site.key_moves, num_tokens, cached) for site in self._spec.sites]
        places = [(span.sample, span.start, span.length) for sample in spans for span in sample]
        inputs = (known[index] for index in self._spec.inputs)
        key = content_digest([*inputs, *tokens, num_tokens, len(spans), *places])
        if key not in self._looks:
            self._looks[key] = self._look(self._evaluated(args, num_tokens, tokens), num_tokens, spans)
            if len(self._looks) > LOOKS_REMEMBERED:
                self._looks.popitem(last=False)
        return self._looks[key]

    def _evaluated(
        self, args: Sequence[Any], num_tokens: int, tokens_of_sites: Sequence[Tensor]
    ) -> Iterator[tuple[MaskSite, Tensor, Tensor]]:
        """``(attention, mask [..., rows, keys], token of each key)`` of each kind of attention."""
        given = iter(self._prologue.masks(*args) if any(site.has_mask for site in self._spec.sites) else ())
        for site, tokens in zip(self._spec.sites, tokens_of_sites, strict=True):
            mask = (
                next(given) if site.has_mask else torch.ones(num_tokens, len(tokens), dtype=torch.bool).tril()
            )
            if mask.dim() >= 2:
                yield site, mask, tokens.to(mask.device)

    def _look(
        self,
        evaluated: Iterator[tuple[MaskSite, Tensor, Tensor]],
        num_tokens: int,
        spans: Sequence[Sequence[Span]],
    ) -> MaskLook:
        refusal, hides, is_whole = None, True, True
        seen = torch.zeros(len(spans), num_tokens, dtype=torch.bool)
        views: list[list[MaskView]] = [[] for _ in spans]
        for site, mask, tokens in evaluated:
            for sample, own in enumerate(spans):
                part = mask[sample : sample + 1] if mask.dim() > 2 and mask.shape[0] > 1 else mask
                view = view_of(part, tokens, num_tokens, own, site.rule)
                views[sample].append(view)
                if view.is_plain:
                    seen[sample] = True
                    continue
                beyond = next((span for span in own if _sees_beyond(part, tokens, span)), None)
                if beyond is not None and refusal is None:
                    detail = f"tokens of the span at {beyond.start} attend to tokens behind it"
                    refusal = UnsupportedGraphError(Reason.MASK_FORM, detail, site.node, site.source_line)
                hides = hides and not _looks_ahead(part, tokens, num_tokens, own)
                is_whole = is_whole and not bool(visible(part)[..., tokens < 0].any())
                seen[sample] |= _seen(part, tokens, num_tokens)
        unseen = tuple((~one).nonzero().flatten() if self._spec.every_layer_has_one else None for one in seen)
        per_sample = list(zip(views, spans, strict=True))
        return MaskLook(
            refusal,
            hides,
            is_whole,
            unseen,
            tuple(tuple(self._of_item(kinds, span) for span in own) for kinds, own in per_sample),
            tuple(self._of_tokens(kinds, num_tokens) for kinds in views),
        )

    def _of_item(self, kinds: Sequence[MaskView], span: Span) -> str:
        texts = [kind.of_item(span) for kind in kinds]
        if all(text == CAUSAL for text in texts):
            return CAUSAL
        return str([CAUSAL if site is None else texts[site] for site in self._spec.site_of_layer])

    def _of_tokens(self, kinds: Sequence[MaskView], num_tokens: int) -> tuple[bytes, ...] | None:
        if all(kind.is_plain for kind in kinds):
            return None
        layers = str(self._spec.site_of_layer)
        return tuple(
            bytes.fromhex(content_digest([layers, *parts]))
            for parts in zip(*(kind.of_tokens(num_tokens) for kind in kinds), strict=True)
        )


def _looks_ahead(mask: Tensor, tokens: Tensor, num_tokens: int, spans: Sequence[Span]) -> bool:
    if mask.shape[-2] != num_tokens:
        return True
    horizon = torch.arange(num_tokens, device=mask.device)
    for span in spans:
        horizon[span.start : span.end] = span.end - 1
    return bool((visible(mask) & (tokens > horizon[:, None])).any())


def _sees_beyond(mask: Tensor, tokens: Tensor, span: Span) -> bool:
    rows = mask[..., span.start : span.end, :] if mask.shape[-2] > 1 else mask
    return bool(visible(rows[..., tokens >= span.end]).any())


def _seen(mask: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
    """Which tokens of the call are attended to, bool [tokens]."""
    shown = visible(mask).reshape(-1, *mask.shape[-2:])
    seen = torch.zeros(num_tokens, dtype=torch.bool)
    seen[tokens[(tokens >= 0) & shown.any(dim=1).any(dim=0)].cpu()] = True
    return seen
