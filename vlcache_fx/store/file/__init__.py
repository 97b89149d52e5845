"""The store ``file:///dir``: entries as authenticated files, under one index for all processes."""

from vlcache_fx.store.file.opening import open_file_store
from vlcache_fx.store.file.store import FileStore

__all__ = ["FileStore", "open_file_store"]
