"""Recognise encoder graphs. Some models are captured as several graphs."""

from vlcache_fx.analysis.attention.sites import find_sites
from vlcache_fx.analysis.decoder.stream import output_nodes
from vlcache_fx.ir import Captured, InputKind


def is_encoder(captured: Captured) -> bool:
    """Return True for a graph with bidirectional attention alone and a floating-point input.

    Such a graph is a pure function of the pixels of one or more items: its results can be stored under the
    content of its inputs.
    """
    sites = find_sites(captured.graph_module.graph)
    data = [
        node
        for node, kind in zip(captured.placeholders, captured.kinds, strict=True)
        if kind is InputKind.DATA and node.users
    ]
    is_bidirectional = bool(sites) and all(
        site.mask is None and not site.is_causal and site.is_prefill for site in sites
    )
    has_floats = any(node.meta["val"].is_floating_point() for node in data)
    return is_bidirectional and has_floats and bool(output_nodes(captured.graph_module.graph))
