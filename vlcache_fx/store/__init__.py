"""Bounded storage of donors between requests, under complete keys. No graph code, no pickle."""

from vlcache_fx.store.base import EntryInfo, Eviction, Store, StoreStats
from vlcache_fx.store.entry import Entry
from vlcache_fx.store.file import FileStore
from vlcache_fx.store.host import HostStore
from vlcache_fx.store.memory import MemoryStore
from vlcache_fx.store.mooncake import MooncakeSettings, MooncakeStore
from vlcache_fx.store.tiered import TieredStore
from vlcache_fx.store.url import open_store

__all__ = [
    "Entry",
    "EntryInfo",
    "Eviction",
    "FileStore",
    "HostStore",
    "MemoryStore",
    "MooncakeSettings",
    "MooncakeStore",
    "Store",
    "StoreStats",
    "TieredStore",
    "open_store",
]
