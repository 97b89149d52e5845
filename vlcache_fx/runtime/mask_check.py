"""What attention masks let tokens of a call see: later tokens, and keys of earlier calls."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.analysis.refusal import refuse
from vlcache_fx.capture.subgraph import extract
from vlcache_fx.errors import Reason
from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.key_tokens import KeyTokens

HIDDEN_BELOW = -1e3
"""Additive masks hide with a large negative number; anything above is a bias."""


class MaskCheck:
    """The masks of one decoder graph, as a small graph of their own.

    Attentions without a mask hide later tokens by themselves, and are looked at only where they have keys of
    earlier calls.

    Raises:
        UnsupportedGraphError: MASK_FORM, where it is not known which keys belong to the tokens of a call.
    """

    def __init__(self, module: fx.GraphModule, facts: DecoderFacts) -> None:
        sites: dict[Node | None, tuple[Node, KeyTokens]] = {}
        for layer, (keys, _) in zip(facts.layers, facts.caches, strict=True):
            site = layer.site
            if site.mask in sites or (site.mask is None and site.is_prefill):
                continue
            if not keys.is_known and not site.is_prefill:
                raise refuse(
                    Reason.MASK_FORM, site.node, "it is not known which of its keys are those of this call"
                )
            sites[site.mask] = (site.node, KeyTokens(module, () if site.is_prefill else keys.moves))
        self._sites = list(sites.values())
        masks = [mask for mask in sites if mask is not None]
        self._given = [mask is not None for mask in sites]
        self._masks = extract(module, masks) if masks else None

    def require_causal(self, args: Sequence[Any], num_tokens: int, spans: Sequence[Span]) -> None:
        """Evaluate the masks for one call. Images may look both ways inside themselves, not behind them.

        Raises:
            UnsupportedGraphError: MASK_FORM. K and V of such tokens belong to one question alone.
        """
        for site, mask, tokens in self._evaluated(args, num_tokens):
            for span in spans:
                if _sees_beyond(mask, tokens, span):
                    raise refuse(
                        Reason.MASK_FORM,
                        site,
                        f"tokens of the span at {span.start} attend to tokens behind it",
                    )

    def hides_what_follows(self, args: Sequence[Any], num_tokens: int, spans: Sequence[Span]) -> bool:
        """True where no token attends to a later one, but for tokens of one span among themselves."""
        masks = self._evaluated(args, num_tokens)
        return not any(_looks_ahead(mask, tokens, num_tokens, spans) for _, mask, tokens in masks)

    def hides_the_past(self, args: Sequence[Any], num_tokens: int) -> bool:
        """True where no token attends to a key that this call did not make: the rest of a cache is empty."""
        return not any(
            bool(_visible(mask)[..., tokens < 0].any())
            for _, mask, tokens in self._evaluated(args, num_tokens)
        )

    def _evaluated(self, args: Sequence[Any], num_tokens: int) -> Iterator[tuple[Node, Tensor, Tensor]]:
        """``(attention, mask [..., rows, keys], token of each key)`` of each kind of attention."""
        given = iter(() if self._masks is None else self._masks(*args))
        for (site, key_tokens), is_given in zip(self._sites, self._given, strict=True):
            tokens = key_tokens(args, num_tokens)
            mask = next(given) if is_given else torch.ones(num_tokens, len(tokens), dtype=torch.bool).tril()
            if mask.dim() >= 2:
                yield site, mask, tokens.to(mask.device)


def _looks_ahead(mask: Tensor, tokens: Tensor, num_tokens: int, spans: Sequence[Span]) -> bool:
    if mask.shape[-2] != num_tokens:
        return True
    horizon = torch.arange(num_tokens, device=mask.device)
    for span in spans:
        horizon[span.start : span.end] = span.end - 1
    return bool((_visible(mask) & (tokens > horizon[:, None])).any())


def _sees_beyond(mask: Tensor, tokens: Tensor, span: Span) -> bool:
    rows = mask[..., span.start : span.end, :] if mask.shape[-2] > 1 else mask
    return bool(_visible(rows[..., tokens >= span.end]).any())


def _visible(mask: Tensor) -> Tensor:
    return mask > HIDDEN_BELOW if mask.is_floating_point() else mask
