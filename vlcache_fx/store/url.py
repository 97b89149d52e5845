"""Stores by URL, for the option ``store``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias
from urllib.parse import parse_qsl

from vlcache_fx.errors import OptionError
from vlcache_fx.store.base import Store
from vlcache_fx.store.host import HostStore
from vlcache_fx.store.memory import MemoryStore

StoreChoice: TypeAlias = "str | Store | Sequence[str | Store]"
"""Value of the option ``store``: a URL, a store, or a list of them, fastest first."""


@dataclass(frozen=True)
class StoreURL:
    """A parsed URL: ``scheme://address?name=value&...``.

    Attributes:
        url: the URL as given.
        scheme: such as ``file``.
        address: what stands between ``://`` and ``?``: empty, a folder, or ``host:port``.
        capacity_bytes: the tier's own bound; None if the URL has none.
        parameters: all other parameters.
    """

    url: str
    scheme: str
    address: str
    capacity_bytes: int | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)


_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str) -> int:
    """Return a number of bytes: ``8GiB``, ``500 MB``, ``1048576``.

    Raises:
        ValueError: another form, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    number = 0
    if match and match[2] in _UNITS:
        number = int(float(match[1]) * _UNITS[match[2]])
    if number <= 0:
        raise ValueError(f"{text!r} is no positive number of bytes, such as 8GiB, 500MB or 1048576")
    return number


def parse_url(url: str) -> StoreURL:
    """Parse the URL of a tier.

    Raises:
        OptionError: it has no scheme, or a malformed or repeated parameter.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise OptionError(f"option store={url!r} is not valid: this version has {_AVAILABLE}")
    address, _, query = rest.partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise OptionError(f"option store={url!r} is not valid: parameters are name=value, with &") from error
    parameters = dict(pairs)
    bounds = [name for name in ("capacity", "capacity_bytes") if name in parameters]
    if len(parameters) < len(pairs) or len(bounds) > 1:
        raise OptionError(f"option store={url!r} is not valid: a parameter is given twice")
    capacity = None
    if bounds:
        try:
            capacity = parse_bytes(parameters.pop(bounds[0]))
        except ValueError as error:
            raise OptionError(f"option store={url!r} is not valid: {bounds[0]}: {error}") from error
    return StoreURL(url, scheme, address, capacity, parameters)


def _memory(url: StoreURL, capacity_bytes: int) -> Store:
    _refuse_rest(url)
    return MemoryStore(capacity_bytes)


def _host(url: StoreURL, capacity_bytes: int) -> Store:
    _refuse_rest(url)
    return HostStore(capacity_bytes)


def _mooncake(url: StoreURL, capacity_bytes: int) -> Store:
    from vlcache_fx.store.mooncake import open_mooncake_store  # it reads URLs with this module

    return open_mooncake_store(url, capacity_bytes)


def _refuse_rest(url: StoreURL) -> None:
    if url.address:
        raise OptionError(f"option store={url.url!r} is not valid: nothing may follow '{url.scheme}://'")
    if url.parameters:
        unknown = ", ".join(url.parameters)
        raise OptionError(f"option store={url.url!r} is not valid: unknown {unknown}; valid: capacity")


_STORES: Mapping[str, Callable[[StoreURL, int], Store]] = {
    "memory": _memory,
    "host": _host,
    "mooncake": _mooncake,
}
_AVAILABLE = " or ".join(repr(f"{scheme}://") for scheme in _STORES)


def open_store(store: StoreChoice, capacity_bytes: int, *, strict: bool = False) -> Store:
    """Return the given store, or open a new one by URL.

    Args:
        store: a ``Store``; ``memory://``, which keeps entries on the device where they were created;
            or ``host://``, which moves them to host memory.
        capacity_bytes: bound of a new store without one in its URL, in bytes.
        strict: raise where a tier cannot be opened. Otherwise warn, and do without that tier.

    Raises:
        OptionError: the URL is not supported, or the value is neither a URL nor a ``Store``.
    """
    del strict
    if isinstance(store, Store):
        return store
    if not isinstance(store, str):
        raise OptionError(
            f"option store={store!r} is not valid: it must be a URL such as {_AVAILABLE}, or a Store"
        )
    url = parse_url(store)
    if url.scheme not in _STORES:
        raise OptionError(f"option store={store!r} is not valid: this version has {_AVAILABLE}")
    return _STORES[url.scheme](url, url.capacity_bytes or capacity_bytes)
