"""Recognise a graph that is an encoder by itself: some models are captured in pieces."""

from vlcache_fx.analysis.attention.sites import find_sites
from vlcache_fx.analysis.decoder.stream import output_nodes
from vlcache_fx.ir import Captured, InputKind


def is_encoder(captured: Captured) -> bool:
    """True for a graph whose attention looks both ways everywhere and whose input is a float tensor.

    Such a graph is a pure function of one item's pixels (or of several items'): its results can be kept under
    the content of its inputs, whatever it computes.
    """
    sites = find_sites(captured.graph_module.graph)
    data = [
        node
        for node, kind in zip(captured.placeholders, captured.kinds, strict=True)
        if kind is InputKind.DATA and node.users
    ]
    both_ways = bool(sites) and all(
        site.mask is None and not site.is_causal and site.is_prefill for site in sites
    )
    floating = any(node.meta["val"].is_floating_point() for node in data)
    return both_ways and floating and bool(output_nodes(captured.graph_module.graph))
