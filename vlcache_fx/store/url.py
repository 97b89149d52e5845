"""Stores by URL, for the option ``store``."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias
from urllib.parse import parse_qsl, unquote

from vlcache_fx.errors import OptionError, StoreError
from vlcache_fx.store.base import Store
from vlcache_fx.store.host import HostStore
from vlcache_fx.store.memory import MemoryStore
from vlcache_fx.store.tiered import TieredStore

log = logging.getLogger("vlcache_fx")

StoreChoice: TypeAlias = "str | Store | Sequence[str | Store]"
"""Value of the option ``store``: a URL, a store, or a list of them, fastest first."""


@dataclass(frozen=True)
class StoreURL:
    """A parsed URL: ``scheme://address?name=value&...``.

    Attributes:
        url: the URL as given.
        scheme: such as ``file``.
        address: what stands between ``://`` and ``?``, unquoted: empty, a folder, or ``host:port``.
        capacity_bytes: the tier's own bound; None if the URL has none.
        parameters: all other parameters.
    """

    url: str
    scheme: str
    address: str
    capacity_bytes: int | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)


FORMS = (
    "a URL ('memory://', 'host://', 'file:///folder' or 'mooncake://host:port', each with ?capacity=8GiB "
    "where it has a bound of its own), a Store object, or a list of them, fastest first"
)
"""The valid values of the option ``store``, in words."""

_BOUNDS = ("capacity", "capacity_bytes")
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
        raise _bad(url, f"it must be {FORMS}")
    address, _, query = rest.partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise _bad(url, "parameters are name=value, with & between them") from error
    parameters = dict(pairs)
    bounds = [name for name in _BOUNDS if name in parameters]
    if len(parameters) < len(pairs) or len(bounds) > 1:
        raise _bad(url, "a parameter is given twice (capacity and capacity_bytes are the same)")
    capacity = None
    if bounds:
        try:
            capacity = parse_bytes(parameters.pop(bounds[0]))
        except ValueError as error:
            raise _bad(url, f"{bounds[0]}: {error}") from error
    return StoreURL(url, scheme, unquote(address), capacity, parameters)


def check_parameters(url: StoreURL, *valid: str) -> None:
    """Check that a URL has no other parameters than a bound and those that its tier knows.

    Raises:
        OptionError: it has; the message names the valid ones.
    """
    unknown = [name for name in url.parameters if name not in valid]
    if unknown:
        names = ", ".join((*_BOUNDS, *valid))
        raise _bad(url.url, f"{url.scheme}:// has no parameter {', '.join(unknown)}; it has: {names}")


def _memory(url: StoreURL, capacity_bytes: int) -> Store:
    _check_empty(url)
    return MemoryStore(capacity_bytes)


def _host(url: StoreURL, capacity_bytes: int) -> Store:
    _check_empty(url)
    return HostStore(capacity_bytes)


def _check_empty(url: StoreURL) -> None:
    if url.address:
        raise _bad(url.url, f"only parameters may follow {url.scheme}://, such as ?capacity=8GiB")
    check_parameters(url)


def _file(url: StoreURL, capacity_bytes: int) -> Store:
    from vlcache_fx.store.file import open_file_store  # not at the top: it imports this module

    return open_file_store(url, capacity_bytes)


def _mooncake(url: StoreURL, capacity_bytes: int) -> Store:
    from vlcache_fx.store.mooncake import open_mooncake_store  # not at the top: an optional package

    return open_mooncake_store(url, capacity_bytes)


Opener: TypeAlias = Callable[[StoreURL, int], Store]
"""Opens a tier with a bound in bytes.

Raises OptionError where the URL is not valid, and StoreError or OSError where the tier cannot be opened now.
"""

_OPENERS: Mapping[str, Opener] = {"memory": _memory, "host": _host, "file": _file, "mooncake": _mooncake}
"""Openers by scheme, fastest first."""


def open_store(store: StoreChoice, capacity_bytes: int, *, strict: bool = False) -> Store:
    """Return the given store, or open a new one.

    Slow tiers, and lists, are behind a ``TieredStore``, so that no request waits for a write.

    Args:
        store: a ``Store``; a URL: ``memory://`` (entries stay on the device where they were created),
            ``host://`` (pinned host memory), ``file:///folder`` or ``mooncake://host:port``; or a list of
            them, fastest first.
        capacity_bytes: bound in bytes of each tier without one in its URL, such as ``?capacity=8GiB``.
        strict: raise where a tier cannot be opened. Otherwise warn and do without it; if none is left,
            ``memory://`` serves.

    Raises:
        OptionError: a value is neither a URL of a known form nor a ``Store``, a list is empty or names a tier
            twice, or a faster tier stands behind a slower one.
        StoreError: with ``strict``, a tier cannot be opened: there is no permission, no space, or nothing
            listens.
    """
    return _open(store, capacity_bytes, strict, _OPENERS)


def open_tier(url: str, capacity_bytes: int) -> Store:
    """Open the tier of a URL by itself: writes are done when they return, and failures are raised.

    Raises:
        OptionError: it is no URL of a known form.
        StoreError: the tier cannot be opened.
    """
    parsed = _parsed(url, _OPENERS)
    assert isinstance(parsed, StoreURL)
    tier = _opened(parsed, capacity_bytes, True, _OPENERS)
    assert tier is not None  # strict
    return tier


def _open(store: StoreChoice, capacity_bytes: int, strict: bool, openers: Mapping[str, Opener]) -> Store:
    if isinstance(store, Store):
        return store
    choices = [store] if isinstance(store, str) else store
    if not isinstance(choices, list | tuple) or not choices:
        raise _bad(store, f"it must be {FORMS}")
    parsed = [_parsed(choice, openers) for choice in choices]
    _check_order(parsed, openers)
    tiers: list[Store] = []
    own: list[Store] = []
    try:
        for item in parsed:
            if isinstance(item, Store):
                tiers.append(item)
                continue
            tier = _opened(item, capacity_bytes, strict, openers)
            if tier is not None:
                tiers.append(tier)
                own.append(tier)
    except BaseException:
        for tier in own:
            tier.close()
        raise
    if not tiers:
        return MemoryStore(capacity_bytes)
    is_plain = len(tiers) == 1 and (tiers[0].is_memory or not own)
    return tiers[0] if is_plain else TieredStore(tiers)


def _parsed(choice: object, openers: Mapping[str, Opener]) -> StoreURL | Store:
    if isinstance(choice, Store):
        return choice
    if not isinstance(choice, str):
        raise _bad(choice, f"it must be {FORMS}")
    url = parse_url(choice)
    if url.scheme not in openers:
        raise _bad(choice, f"there is no {url.scheme}://; it must be {FORMS}")
    return url


def _check_order(tiers: Sequence[StoreURL | Store], openers: Mapping[str, Opener]) -> None:
    """Check that no tier is given twice, and none behind a slower one."""
    places: set[object] = set()
    last = 0
    for tier in tiers:
        place: object = id(tier)
        if isinstance(tier, StoreURL):
            address = str(Path(tier.address).resolve()) if tier.scheme == "file" else tier.address
            place = tier.scheme, address
            rank = list(openers).index(tier.scheme)
            if rank < last:
                order = ", ".join(f"{scheme}://" for scheme in openers)
                raise _bad(tier.url, f"it stands behind a slower tier; the order is {order}")
            last = rank
        if place in places:
            name = tier.url if isinstance(tier, StoreURL) else tier
            raise _bad(name, "the list has this tier twice")
        places.add(place)


def _opened(url: StoreURL, capacity_bytes: int, strict: bool, openers: Mapping[str, Opener]) -> Store | None:
    try:
        return openers[url.scheme](url, url.capacity_bytes or capacity_bytes)
    except (StoreError, OSError) as error:
        message = f"the tier {url.url!r} of option store cannot be opened: {error}"
        if strict:
            raise StoreError(message) from error
        log.warning("vlcache: %s; going on without it", message)
        return None


def _bad(value: object, problem: str) -> OptionError:
    return OptionError(f"option store={value!r} is not valid: {problem}")
