"""Identity of bytes: digests of tensors, weights and plain values.

Takes tensors and plain values; returns digests, equal only for equal bytes. Imports neither graphs nor the
store.
"""

from vlcache_fx.keys.digest import content_digest
from vlcache_fx.keys.weights import WeightsFingerprint

__all__ = ["WeightsFingerprint", "content_digest"]
