"""Opens the store of a worker, with faults in front of its tiers and inside them."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from dataclasses import replace

from vlcache_fx.bench.stress.faulty_store import FaultyStore
from vlcache_fx.bench.stress.settings import FaultRates, StressSettings
from vlcache_fx.errors import OptionError, StoreError
from vlcache_fx.store.base import Store
from vlcache_fx.store.memory import MemoryStore
from vlcache_fx.store.tiered import TieredStore
from vlcache_fx.store.url import StoreURL, parse_url


def open_disturbed(settings: StressSettings, label: str, on_fault: Callable[[str], None]) -> FaultyStore:
    """Open the tiers of ``settings.stores`` as one store that fails at random.

    As with the option ``strict=False``, a tier that cannot be opened now is left out.

    Args:
        settings: of the run.
        label: seed of the faults.
        on_fault: called with the name of each injected fault.

    Raises:
        OptionError: a URL is not valid.
    """
    tiers: list[Store] = []
    for number, text in enumerate(settings.stores):
        url = parse_url(text)
        try:
            tier = open_tier(url, settings, label, on_fault)
        except (StoreError, OSError):
            on_fault("tier not opened")
            continue
        slow = FaultyStore(tier, f"{label}-{number}", settings.rates, on_fault)
        tiers.append(tier if tier.is_memory else slow)
    if not tiers or (len(tiers) == 1 and tiers[0].is_memory):
        memory = tiers[0] if tiers else MemoryStore(settings.capacity_bytes)
        return FaultyStore(memory, label, settings.rates, on_fault)
    # What stands in front of all tiers fails seldom: it hides them from the request.
    rare = replace(settings.rates, **{name: value / 4 for name, value in vars(settings.rates).items()})
    return FaultyStore(TieredStore(tiers), label, replace(rare, timeout_s=settings.rates.timeout_s), on_fault)


def open_tier(url: StoreURL, settings: StressSettings, label: str, on_fault: Callable[[str], None]) -> Store:
    """Open one tier; writes of a file tier fail at random.

    Raises:
        OptionError: there is no such tier.
        StoreError: it cannot be opened now.
    """
    capacity_bytes = url.capacity_bytes or settings.capacity_bytes
    match url.scheme:
        case "memory":
            return MemoryStore(capacity_bytes)
        case "file":
            from vlcache_fx.store.file import FileStore

            write = FaultyWriter(label, settings.rates, on_fault)
            reads = url.parameters.get("read", "mapped")
            return FileStore(url.address, capacity_bytes, reads=reads, write=write)
        case "mooncake":
            from vlcache_fx.store.mooncake import open_mooncake_store

            return open_mooncake_store(url, capacity_bytes)
    raise OptionError(f"store={url.url!r} is not valid: the stress has memory://, file:// and mooncake://")


class FaultyWriter:
    """Writes bytes to a file descriptor, as ``os.write``; some writes are short or fail.

    Args:
        seed: seed of the faults.
        rates: ``write_error`` is the chance that a file does not fit on the disk.
        on_fault: called with the name of each injected fault.
    """

    def __init__(self, seed: str, rates: FaultRates, on_fault: Callable[[str], None]) -> None:
        self._rates, self._on_fault, self._lock = rates, on_fault, threading.Lock()
        self._draw = random.Random(f"writer-{seed}")  # noqa: S311 - no secret

    def __call__(self, handle: int, data: memoryview) -> int:
        """Write some of ``data``; return how many bytes.

        Raises:
            OSError: ENOSPC or EIO.
        """
        with self._lock:
            chance, share = self._draw.random(), self._draw.random()
        if chance < self._rates.write_error:
            os.write(handle, data[: int(share * data.nbytes)])  # a part of it stands in the file
            code = errno.ENOSPC if share < 0.5 else errno.EIO
            self._on_fault(f"write of a file: {errno.errorcode[code]}")
            raise OSError(code, os.strerror(code))
        return os.write(handle, data[: max(1, int(share * data.nbytes))])
