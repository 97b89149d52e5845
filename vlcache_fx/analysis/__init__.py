"""Read-only facts about a captured graph, from its structure alone."""

from vlcache_fx.analysis.attention.sites import Site
from vlcache_fx.analysis.decoder.decode_step import DecodeStepFacts, analyze_decode_step
from vlcache_fx.analysis.decoder.facts import DecoderFacts, analyze
from vlcache_fx.analysis.decoder.layers import LayerSplit
from vlcache_fx.analysis.decoder.merge import Merge
from vlcache_fx.analysis.decoder.outputs import TailRows
from vlcache_fx.analysis.decoder.stream import Stream
from vlcache_fx.analysis.tokens.axis import TokenFlow

__all__ = [
    "DecodeStepFacts",
    "DecoderFacts",
    "LayerSplit",
    "Merge",
    "Site",
    "Stream",
    "TailRows",
    "TokenFlow",
    "analyze",
    "analyze_decode_step",
]
