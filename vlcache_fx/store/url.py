"""Stores by URL, for the option ``store``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vlcache_fx.errors import OptionError
from vlcache_fx.store.base import Store
from vlcache_fx.store.host import HostStore
from vlcache_fx.store.memory import MemoryStore

_STORES: Mapping[str, Callable[[int], Store]] = {"memory": MemoryStore, "host": HostStore}
_AVAILABLE = " or ".join(repr(f"{scheme}://") for scheme in _STORES)
_PLANNED = ("file", "mooncake")


def open_store(store_or_url: str | Store, capacity_bytes: int) -> Store:
    """Return the given store, or open a new one by URL.

    Args:
        store_or_url: a ``Store``; ``memory://``, which keeps entries on the device where they were created;
            or ``host://``, which moves them to host memory.
        capacity_bytes: bound of a new store, in bytes; a given ``Store`` keeps its own.

    Raises:
        OptionError: the URL is not supported, or the value is neither a URL nor a ``Store``.
    """
    if isinstance(store_or_url, Store):
        return store_or_url
    if not isinstance(store_or_url, str):
        raise OptionError(
            f"option store={store_or_url!r} is not valid: it must be a URL such as {_AVAILABLE}, or a Store"
        )
    scheme, separator, rest = store_or_url.partition("://")
    if scheme in _STORES and separator:
        if rest:
            raise OptionError(
                f"option store={store_or_url!r} is not valid: nothing may follow {scheme + separator!r}"
            )
        return _STORES[scheme](capacity_bytes)
    if scheme in _PLANNED and separator:
        raise OptionError(
            f"option store={store_or_url!r} is not available in this version, which has {_AVAILABLE}"
        )
    raise OptionError(f"option store={store_or_url!r} is not valid: this version has {_AVAILABLE}")
