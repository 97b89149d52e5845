"""Where donors are kept between requests, and how they are named. No graph code, no pickle."""

from vlcache_fx.store.base import Store, StoreStats
from vlcache_fx.store.entry import Entry
from vlcache_fx.store.host import HostStore
from vlcache_fx.store.keys import content_digest
from vlcache_fx.store.memory import MemoryStore
from vlcache_fx.store.url import open_store
from vlcache_fx.store.weights import WeightsFingerprint

__all__ = [
    "Entry",
    "HostStore",
    "MemoryStore",
    "Store",
    "StoreStats",
    "WeightsFingerprint",
    "content_digest",
    "open_store",
]
