"""Builds the spec of attention masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Node

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.analysis.decoder.mask_rule import mask_rule
from vlcache_fx.compiler.builders.key_moves import key_moves
from vlcache_fx.errors import Reason
from vlcache_fx.ir.refusal import refuse, source_line
from vlcache_fx.ir.subgraph import needed_for
from vlcache_fx.spec.decoder import MaskSite, MaskSpec


@dataclass(frozen=True)
class FoundMasks:
    """The masks of one graph.

    Attributes:
        spec: the spec.
        masks: nodes whose values the program ``masks`` returns.
        cache_values: nodes whose values the program ``cache_values`` returns.
    """

    spec: MaskSpec
    masks: tuple[Node, ...]
    cache_values: tuple[Node, ...]


def find_masks(facts: DecoderFacts, index: Mapping[Node, int]) -> FoundMasks:
    """Return the masks of a decoder, given the index of each input.

    Raises:
        UnsupportedGraphError: MASK_FORM, where the keys of the call's tokens are unknown.
    """
    sites: dict[Node | None, MaskSite] = {}
    cache_values: dict[Node, int] = {}
    for layer, (keys, _) in zip(facts.layers, facts.caches, strict=True):
        site = layer.site
        if site is None or keys is None or site.mask in sites or (site.mask is None and site.is_prefill):
            continue
        mask = site.mask
        if not keys.is_known and not site.is_prefill:
            raise refuse(Reason.MASK_FORM, site.node, "the keys of this call cannot be identified")
        sites[mask] = MaskSite(
            site.node.name,
            source_line(site.node),
            mask is not None,
            "" if mask is None else mask_rule(mask, facts),
            key_moves(() if site.is_prefill else keys.ops, cache_values),
        )
    masks, kinds = masks_of(facts), list(sites)
    needed = needed_for(masks)
    spec = MaskSpec(
        sites=tuple(sites.values()),
        inputs=tuple(i for node, i in index.items() if node in needed and node not in facts.past),
        every_layer_has_one=all(site.mask is not None for site in facts.sites),
        site_of_layer=tuple(
            kinds.index(layer.site.mask)
            if layer.site is not None and keys is not None and layer.site.mask in sites
            else None
            for layer, (keys, _) in zip(facts.layers, facts.caches, strict=True)
        ),
    )
    return FoundMasks(spec, tuple(masks), tuple(cache_values))


def masks_of(facts: DecoderFacts) -> list[Node]:
    """Return the distinct masks of attention to tokens of the call, in the order of layers."""
    kinds = dict.fromkeys(
        layer.site.mask
        for layer, (keys, _) in zip(facts.layers, facts.caches, strict=True)
        if layer.site is not None and keys is not None
    )
    return [mask for mask in kinds if mask is not None]
