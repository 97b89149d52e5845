"""Capture: bring a traced graph to one IR."""

from vlcache_fx.capture.captured import Captured, InputKind, Write
from vlcache_fx.capture.dynamo import capture_dynamo
from vlcache_fx.capture.exported import capture_exported

__all__ = ["Captured", "InputKind", "Write", "capture_dynamo", "capture_exported"]
