"""Checks that explicit attention masks hide later text from the tokens of a span."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.analysis.refusal import refuse
from vlcache_fx.capture.subgraph import extract
from vlcache_fx.errors import Reason
from vlcache_fx.plan.types import Span

HIDDEN_BELOW = -1e3
"""Additive masks hide with a large negative number; anything above is a bias."""


class MaskCheck:
    """The masks of one decoder graph, as a small graph of their own."""

    def __init__(self, module: fx.GraphModule, facts: DecoderFacts) -> None:
        masks = {layer.site.mask: layer.site.node for layer in facts.layers if layer.site.mask is not None}
        self._sites = list(masks.values())
        self._masks = extract(module, list(masks)) if masks else None

    def require_causal(self, args: Sequence[Any], spans: Sequence[Span]) -> None:
        """Evaluate the masks for one call. Images may look both ways inside themselves, not behind them.

        Raises:
            UnsupportedGraphError: MASK_FORM. K and V of such tokens belong to one question alone.
        """
        if self._masks is None:
            return
        for mask, site in zip(self._masks(*args), self._sites, strict=True):
            for span in spans:
                if mask.dim() >= 2 and _sees_beyond(mask, span):
                    raise refuse(
                        Reason.MASK_FORM,
                        site,
                        f"tokens of the span at {span.start} attend to tokens behind it",
                    )

    def hides_what_follows(self, args: Sequence[Any], spans: Sequence[Span]) -> bool:
        """True where no token attends to a later one, but for tokens of one span among themselves."""
        if self._masks is None:
            return True
        return not any(mask.dim() >= 2 and _looks_ahead(mask, spans) for mask in self._masks(*args))


def _looks_ahead(mask: Tensor, spans: Sequence[Span]) -> bool:
    tokens = mask.shape[-1]
    if mask.shape[-2] != tokens:
        return True
    horizon = torch.arange(tokens, device=mask.device)
    for span in spans:
        horizon[span.start : span.end] = span.end - 1
    later = torch.arange(tokens, device=mask.device) > horizon[:, None]
    return bool((_visible(mask) & later).any())


def _sees_beyond(mask: Tensor, span: Span) -> bool:
    rows = mask[..., span.start : span.end, :] if mask.shape[-2] > 1 else mask
    return bool(_visible(rows[..., span.end :]).any())


def _visible(mask: Tensor) -> Tensor:
    return mask > HIDDEN_BELOW if mask.is_floating_point() else mask
