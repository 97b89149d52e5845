"""The graph that analysis and passes work on, and tools to read, cut and copy it.

It knows no models, layers or caches. Every package that handles graphs imports it.
"""

from vlcache_fx.ir.captured import Captured, InputKind
from vlcache_fx.spec.mutations import Write

__all__ = ["Captured", "InputKind", "Write"]
