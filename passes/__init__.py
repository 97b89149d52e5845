"""Graph passes: each takes a ``Program``, rewrites its graph in place and says whether it changed something.

The compiler and the exporter import this package, as ``vlcache_fx.passes``.
"""

if __name__ != "vlcache_fx.passes":
    raise ImportError("this package is imported as 'vlcache_fx.passes', not as a top-level 'passes'")

from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.pipeline import PassRecord, Pipeline

__all__ = ["Pass", "PassRecord", "Pipeline", "Program"]
