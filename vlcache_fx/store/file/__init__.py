"""The store ``file:///dir``: entries as authenticated files, under one index for all processes."""

from vlcache_fx.store.file.store import FileStore, open_file_store

__all__ = ["FileStore", "open_file_store"]
