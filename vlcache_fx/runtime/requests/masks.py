"""What the attention masks of a call let its tokens see: tokens behind them, and keys of earlier calls."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.analysis.decoder.mask_rule import mask_rule
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir import Captured
from vlcache_fx.ir.refusal import refuse, source_line
from vlcache_fx.ir.subgraph import extract, needed_for
from vlcache_fx.keys.digest import content_digest
from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.requests.key_tokens import KeyTokens
from vlcache_fx.runtime.requests.mask_view import CAUSAL, MaskView, view_of, visible

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


@dataclass(frozen=True)
class MaskSite:
    """One kind of attention.

    Attributes:
        node, source_line: for refusals: the name of the first such attention, and where it comes from.
        has_mask: False where it hides later tokens by itself.
        rule: its parameters, such as the width of a window; empty without.
    """

    node: str
    source_line: str | None
    has_mask: bool
    rule: str = ""


class MaskCheck:
    """The masks of one decoder graph.

    They are evaluated again for every call whose masks may differ: whose inputs to them or spans do.
    Attentions without a mask hide later tokens by themselves, and are looked at only where they have keys of
    earlier calls.

    Args:
        sites: the kinds of attention that have to be looked at.
        key_tokens: per site, from the graph's inputs and the number of tokens to the token of each key.
        masks: from the graph's inputs to the masks of the sites that have one.
        inputs: indices of the inputs that masks depend on.
        every_layer_has_one: whether some layer shows no mask.
        site_of_layer: per layer, the index of its kind of attention among ``sites``; None where it need not
            be looked at.
    """

    def __init__(
        self,
        sites: Sequence[MaskSite],
        key_tokens: Sequence[Callable[[Sequence[Any], int], Tensor]],
        masks: Callable[..., Sequence[Tensor]],
        inputs: Sequence[int],
        *,
        every_layer_has_one: bool,
        site_of_layer: Sequence[int | None] = (),
    ) -> None:
        self.site_of_layer = tuple(site_of_layer)
        self.sites, self.inputs, self.every_layer_has_one = tuple(sites), tuple(inputs), every_layer_has_one
        self._key_tokens, self._masks = tuple(key_tokens), masks
        self._looks: OrderedDict[str, MaskLook] = OrderedDict()

    @classmethod
    def of(cls, captured: Captured, facts: DecoderFacts) -> "MaskCheck":
        """Of a captured graph.

        Raises:
            UnsupportedGraphError: MASK_FORM, where it is not known which keys belong to the tokens of a call.
        """
        module = captured.graph_module
        sites: dict[Node | None, tuple[Node, KeyTokens]] = {}
        for layer, (keys, _) in zip(facts.layers, facts.caches, strict=True):
            site = layer.site
            if keys is None or site.mask in sites or (site.mask is None and site.is_prefill):
                continue
            if not keys.is_known and not site.is_prefill:
                raise refuse(
                    Reason.MASK_FORM, site.node, "it is not known which of its keys are those of this call"
                )
            sites[site.mask] = (site.node, KeyTokens(module, () if site.is_prefill else keys.moves))
        masks, kinds = masks_of(facts), list(sites)
        needed, placeholders = needed_for(masks), module.graph.find_nodes(op="placeholder")
        return cls(
            [
                MaskSite(
                    node.name,
                    source_line(node),
                    mask is not None,
                    "" if mask is None else mask_rule(mask, facts),
                )
                for mask, (node, _) in sites.items()
            ],
            [tokens for _, tokens in sites.values()],
            extract(module, masks),
            [i for i, node in enumerate(placeholders) if node in needed and node not in facts.past],
            every_layer_has_one=all(layer.site.mask is not None for layer in facts.layers),
            site_of_layer=[
                kinds.index(layer.site.mask) if keys is not None and layer.site.mask in sites else None
                for layer, (keys, _) in zip(facts.layers, facts.caches, strict=True)
            ],
        )

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
        if not self.sites:
            return MaskLook(
                unseen=(None,) * len(spans),
                of_items=tuple((CAUSAL,) * len(own) for own in spans),
                of_tokens=(None,) * len(spans),
            )
        key_tokens = [tokens(args, num_tokens) for tokens in self._key_tokens]
        places = [(span.sample, span.start, span.length) for sample in spans for span in sample]
        inputs = (known[index] for index in self.inputs)
        key = content_digest([*inputs, *key_tokens, num_tokens, len(spans), *places])
        if key not in self._looks:
            self._looks[key] = self._look(self._evaluated(args, num_tokens, key_tokens), num_tokens, spans)
            if len(self._looks) > LOOKS_REMEMBERED:
                self._looks.popitem(last=False)
        return self._looks[key]

    def _evaluated(
        self, args: Sequence[Any], num_tokens: int, key_tokens: Sequence[Tensor]
    ) -> Iterator[tuple[MaskSite, Tensor, Tensor]]:
        """``(attention, mask [..., rows, keys], token of each key)`` of each kind of attention."""
        given = iter(self._masks(*args) if any(site.has_mask for site in self.sites) else ())
        for site, tokens in zip(self.sites, key_tokens, strict=True):
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
        unseen = tuple((~one).nonzero().flatten() if self.every_layer_has_one else None for one in seen)
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
        return str([CAUSAL if site is None else texts[site] for site in self.site_of_layer])

    def _of_tokens(self, kinds: Sequence[MaskView], num_tokens: int) -> tuple[bytes, ...] | None:
        if all(kind.is_plain for kind in kinds):
            return None
        layers = str(self.site_of_layer)
        return tuple(
            bytes.fromhex(content_digest([layers, *parts]))
            for parts in zip(*(kind.of_tokens(num_tokens) for kind in kinds), strict=True)
        )


def masks_of(facts: DecoderFacts) -> list[Node]:
    """The different masks of attentions to tokens of the call, in the order of layers."""
    kinds = dict.fromkeys(
        layer.site.mask
        for layer, (keys, _) in zip(facts.layers, facts.caches, strict=True)
        if keys is not None
    )
    return [mask for mask in kinds if mask is not None]


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
