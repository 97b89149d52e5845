"""What explicit attention masks let tokens see: whether rows of a span belong to it alone."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.analysis.refusal import refuse
from vlcache_fx.capture.subgraph import extract, needed_for
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.plan.types import Span
from vlcache_fx.store.keys import content_digest

HIDDEN_BELOW = -1e3
"""Additive masks hide with a large negative number; anything above is a bias."""

LOOKS_REMEMBERED = 256


@dataclass(frozen=True)
class MaskLook:
    """What the masks of one call let tokens see.

    Attributes:
        refusal: a span's tokens attend to tokens behind it, so their K and V belong to one question alone.
        hides_what_follows: no token attends to a later one, but for tokens of one span among themselves.
        unseen: per sample, positions that no other token attends to; None where there is no mask.
    """

    refusal: UnsupportedGraphError | None = None
    hides_what_follows: bool = True
    unseen: tuple[Tensor | None, ...] = ()


class MaskCheck:
    """The masks of one decoder graph, as a small graph of their own.

    They are evaluated again for every call whose masks may differ: whose inputs to them or spans do.
    """

    def __init__(self, module: fx.GraphModule, facts: DecoderFacts) -> None:
        masks = {layer.site.mask: layer.site.node for layer in facts.layers if layer.site.mask is not None}
        self._sites = list(masks.values())
        self._masks = extract(module, list(masks)) if masks else None
        needed, placeholders = needed_for(masks), module.graph.find_nodes(op="placeholder")
        self._inputs = [index for index, node in enumerate(placeholders) if node in needed]
        self._looks: OrderedDict[str, MaskLook] = OrderedDict()

    def look(self, args: Sequence[Any], spans: Sequence[Sequence[Span]]) -> MaskLook:
        """What tokens see in one call.

        Args:
            args: the graph's inputs.
            spans: per sample. Images may look both ways inside themselves, not behind them.
        """
        if self._masks is None:
            return MaskLook(unseen=(None,) * len(spans))
        places = [(span.sample, span.start, span.length) for sample in spans for span in sample]
        key = content_digest([*(args[index] for index in self._inputs), len(spans), *places])
        if key not in self._looks:
            self._looks[key] = self._look(args, spans)
            if len(self._looks) > LOOKS_REMEMBERED:
                self._looks.popitem(last=False)
        return self._looks[key]

    def _look(self, args: Sequence[Any], spans: Sequence[Sequence[Span]]) -> MaskLook:
        assert self._masks is not None
        refusal, hides = None, True
        seen: list[Tensor | None] = [None] * len(spans)
        for mask, site in zip(self._masks(*args), self._sites, strict=True):
            if mask.dim() < 2:
                continue
            for sample, own in enumerate(spans):
                part = mask[sample : sample + 1] if mask.dim() > 2 and mask.shape[0] > 1 else mask
                beyond = next((span for span in own if _sees_beyond(part, span)), None)
                if beyond is not None and refusal is None:
                    detail = f"tokens of the span at {beyond.start} attend to tokens behind it"
                    refusal = refuse(Reason.MASK_FORM, site, detail)
                hides = hides and not _looks_ahead(part, own)
                columns, before = _seen(part), seen[sample]
                seen[sample] = columns if before is None else before | columns
        unseen = tuple(None if one is None else (~one).nonzero().flatten().cpu() for one in seen)
        return MaskLook(refusal, hides, unseen)


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


def _seen(mask: Tensor) -> Tensor:
    """Which tokens are attended to by another one, bool [tokens]."""
    tokens = mask.shape[-1]
    visible = _visible(mask).reshape(-1, *mask.shape[-2:])
    if mask.shape[-2] == tokens:
        visible = visible & ~torch.eye(tokens, dtype=torch.bool, device=mask.device)
    return visible.any(dim=1).any(dim=0)


def _visible(mask: Tensor) -> Tensor:
    return mask > HIDDEN_BELOW if mask.is_floating_point() else mask
