"""Capture: bring a traced graph to one IR."""

from vlcache_fx.capture.captured import Captured, InputKind
from vlcache_fx.capture.dynamo import capture_dynamo

__all__ = ["Captured", "InputKind", "capture_dynamo"]
