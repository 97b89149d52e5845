"""Graphs of Dynamo and ``torch.export`` as the IR: functional pre-dispatch ATen."""

from vlcache_fx.capture.dynamo import capture_dynamo
from vlcache_fx.capture.exported import capture_exported

__all__ = ["capture_dynamo", "capture_exported"]
