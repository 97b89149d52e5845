"""Facts about a decoding step: its layers alone, since it reuses nothing."""

from __future__ import annotations

from dataclasses import dataclass

from vlcache_fx.analysis.attention.sites import Site, find_sites
from vlcache_fx.analysis.decoder.stream import Stream, find_stream
from vlcache_fx.analysis.recurrences import find_mixers
from vlcache_fx.errors import Reason
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.ir.refusal import refuse


@dataclass(frozen=True)
class DecodeStepFacts:
    """The layers of a decoding step.

    Attributes:
        sites: the attention sites, in graph order.
        stream: the residual stream and its layers.
    """

    sites: tuple[Site, ...]
    stream: Stream


def analyze_decode_step(captured: Captured) -> DecodeStepFacts:
    """Find the layers of a decoding step, without changing the graph.

    Raises:
        UnsupportedGraphError: NO_ATTENTION, or NO_STREAM.
    """
    graph = captured.graph_module.graph
    sites = find_sites(graph)
    if not sites:
        raise refuse(Reason.NO_ATTENTION, None, "the graph has no attention call")
    mixers = find_mixers(graph, sites, None)
    return DecodeStepFacts(sites, find_stream(graph, mixers, captured.inputs_of(InputKind.DATA)))
