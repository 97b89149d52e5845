"""Annotations on a rewritten graph: segments to compile, declared inputs. Lowerings read them."""

from vlcache_fx.passes.annotate.declare_inputs import DeclareInputs
from vlcache_fx.passes.annotate.tag_segments import TagSegments

__all__ = ["DeclareInputs", "TagSegments"]
