"""The identity of bytes: digests of tensors, weights and values.

Takes tensors and plain values, gives digests that are equal only where the bytes are. Imports no graphs and
no store."""

from vlcache_fx.keys.digest import content_digest
from vlcache_fx.keys.weights import WeightsFingerprint

__all__ = ["WeightsFingerprint", "content_digest"]
