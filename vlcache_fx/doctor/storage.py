"""The store: whether an entry can be written, read and dropped."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

from vlcache_fx.doctor.check import Check, Status, text_of
from vlcache_fx.errors import OptionError, StoreError

if TYPE_CHECKING:
    from vlcache_fx.store import Store

DROP_S = 10.0
"""How long an entry may take to go."""


def check_store(url: str) -> Check:
    """Open a store, write an entry under a key of its own, read it, and drop it.

    A folder that does not exist is created, as a server would create it. Bounds stay as they are.
    """
    from vlcache_fx.options import Options
    from vlcache_fx.store.url import open_tier

    name = f"store {url}"
    try:
        tier = open_tier(url, Options().capacity_bytes)
    except OptionError as error:
        return Check(name, Status.FAILED, text_of(error), "docs/store.md has the URLs of stores")
    except StoreError as error:
        return Check(name, Status.FAILED, text_of(error), _advice(url))
    try:
        problem, milliseconds = _tried(tier)
        stats = tier.stats()
    except StoreError as error:
        return Check(name, Status.FAILED, text_of(error), _advice(url))
    finally:
        tier.close()
    if problem is not None:
        return Check(name, Status.FAILED, problem, _advice(url))
    size = (
        f"{stats.entries} entries, {stats.used_bytes / 2**20:,.0f} of {stats.capacity_bytes / 2**20:,.0f} MiB"
    )
    return Check(name, Status.OK, f"written, read and dropped an entry in {milliseconds:.1f} ms; {size}")


def _tried(tier: Store) -> tuple[str | None, float]:
    """Write, read and drop an entry; return what went wrong, and milliseconds until it was read."""
    import torch

    from vlcache_fx.keys.entry_key import KeyScope
    from vlcache_fx.store import Entry

    own = uuid.uuid4().hex
    key = KeyScope("vlcache doctor", own).key("features", {"content": own})
    values = torch.arange(1024, dtype=torch.float32)
    begin_s, problem = time.perf_counter(), None
    try:
        if not tier.put(key, Entry({"values": values}, {})):
            problem = "an entry of 4 KiB was refused as too large"
        elif (found := tier.get(key)) is None:
            problem = "an entry that was written is not found"
        elif not torch.equal(found.tensors["values"].cpu(), values):
            problem = "an entry was read with other values than were written"
        milliseconds = 1e3 * (time.perf_counter() - begin_s)
    finally:
        is_dropped = _dropped(tier, key)
    if problem is None and not is_dropped:
        problem = f"an entry is still there {DROP_S:g} s after it was dropped"
    return problem, milliseconds


def _dropped(tier: Store, key: str) -> bool:
    """Drop an entry; Mooncake keeps one that was just read for a moment."""
    from vlcache_fx.keys.entry_key import Selection

    end_s = time.monotonic() + DROP_S
    while True:
        tier.clear(Selection(key=key))
        if key not in tier:
            return True
        if time.monotonic() > end_s:
            return False
        time.sleep(0.1)


def _advice(url: str) -> str:
    scheme = url.partition("://")[0]
    hints = {
        "file": "check that the folder can be written to, and that its disk has space",
        "mooncake": "check that its master runs at this address; docs/store-mooncake.md says how to start it",
    }
    return hints.get(scheme, "")
