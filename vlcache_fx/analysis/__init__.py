"""Analysis: read-only facts about a captured graph, found by structure alone."""

from vlcache_fx.analysis.axis import RowStep
from vlcache_fx.analysis.decoder import DecoderFacts, analyze
from vlcache_fx.analysis.frontier import LayerParts
from vlcache_fx.analysis.merge import Merge
from vlcache_fx.analysis.outputs import TailRows
from vlcache_fx.analysis.sites import Site
from vlcache_fx.analysis.step import StepFacts, analyze_step
from vlcache_fx.analysis.stream import Stream

__all__ = [
    "DecoderFacts",
    "LayerParts",
    "Merge",
    "RowStep",
    "Site",
    "StepFacts",
    "Stream",
    "TailRows",
    "analyze",
    "analyze_step",
]
