"""Opening stores by URL."""

from typing import Any

import pytest

from vlcache_fx.errors import OptionError
from vlcache_fx.store import MemoryStore, open_store


def test_open_store_memory() -> None:
    store = open_store("memory://", 123)
    assert isinstance(store, MemoryStore)
    assert store.stats().capacity_bytes == 123


def test_open_store_returns_a_store_unchanged() -> None:
    store = MemoryStore(7)
    assert open_store(store, 123) is store


@pytest.mark.parametrize("url", ["memory", "memory://x", "memory:", "", "s3://bucket", "/tmp", None, 3])
def test_open_store_invalid_urls(url: Any) -> None:
    with pytest.raises(OptionError, match="not valid"):
        open_store(url, 1)
