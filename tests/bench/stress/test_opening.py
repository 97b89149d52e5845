import os
from pathlib import Path

import pytest

from vlcache_fx.bench.stress.opening import FaultyWriter, open_disturbed
from vlcache_fx.bench.stress.settings import FaultRates, StressSettings
from vlcache_fx.errors import OptionError
from vlcache_fx.store import TieredStore


def test_tiers_are_disturbed(tmp_path: Path) -> None:
    stores = ("memory://?capacity=1KiB", f"file://{tmp_path / 'store'}?capacity=1MiB")
    store = open_disturbed(StressSettings(stores), "a", [].append)
    assert isinstance(store.inner, TieredStore)
    assert [tier.capacity_bytes for tier in store.stats().tiers] == [1 << 10, 1 << 20]
    store.close()


def test_unknown_tier() -> None:
    with pytest.raises(OptionError, match="nowhere://"):
        open_disturbed(StressSettings(("nowhere://",)), "a", [].append)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_faulty_writer(rate: float, tmp_path: Path) -> None:
    faults: list[str] = []
    write = FaultyWriter("0", FaultRates(write_error=rate), faults.append)
    data = memoryview(bytes(range(100)))
    path = tmp_path / "file"
    handle = os.open(path, os.O_CREAT | os.O_WRONLY)
    if rate:
        with pytest.raises(OSError, match=r"No space|Input/output"):
            write(handle, data)
    else:
        done = 0
        while done < 100:
            done += write(handle, data[done:])
    os.close(handle)
    assert bool(faults) is bool(rate)
    assert data.tobytes().startswith(path.read_bytes())
    assert rate or path.stat().st_size == 100
