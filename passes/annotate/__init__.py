"""Passes that annotate graphs for lowerings."""

from vlcache_fx.passes.annotate.declare_inputs import DeclareInputs
from vlcache_fx.passes.annotate.tag_segments import TagSegments

__all__ = ["DeclareInputs", "TagSegments"]
