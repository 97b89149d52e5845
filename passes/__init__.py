"""Graph passes: rewrites of captured graphs into programs. Imported as ``vlcache_fx.passes``."""

if __name__ != "vlcache_fx.passes":
    raise ImportError("this package is imported as 'vlcache_fx.passes', not as a top-level 'passes'")

from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.pipeline import PassRecord, Pipeline

__all__ = ["Pass", "PassRecord", "Pipeline", "Program"]
