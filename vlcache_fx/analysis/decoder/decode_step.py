"""Facts about a decoding step: its layers, and no more, since it has nothing to reuse."""

from __future__ import annotations

from dataclasses import dataclass

from vlcache_fx.analysis.attention.sites import Site, find_sites
from vlcache_fx.analysis.decoder.stream import Stream, find_stream
from vlcache_fx.errors import Reason
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.ir.refusal import refuse


@dataclass(frozen=True)
class DecodeStepFacts:
    """The layers of a decoding step.

    Attributes:
        sites: the attentions, one for each layer, in graph order.
        stream: the residual stream and its layers.
    """

    sites: tuple[Site, ...]
    stream: Stream


def analyze_decode_step(captured: Captured) -> DecodeStepFacts:
    """Find the layers of a graph; nothing in it is changed.

    Raises:
        UnsupportedGraphError: NO_ATTENTION, or NO_STREAM.
    """
    graph = captured.graph_module.graph
    sites = find_sites(graph)
    if not sites:
        raise refuse(Reason.NO_ATTENTION, None, "the graph has no attention call")
    return DecodeStepFacts(sites, find_stream(graph, sites, captured.inputs_of(InputKind.DATA)))
