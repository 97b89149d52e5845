"""Real processes that die, hang and come back: calls return, and the store is used again afterwards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from vlcache_fx.errors import DamagedEntryError, StoreError
from vlcache_fx.store import Entry, MooncakeSettings, MooncakeStore
from vlcache_fx.testing.mooncake_cluster import MooncakeCluster, missing

from .proxy import Proxy

VALUE = Entry({f"k.{layer}": torch.full((256, 1024), float(layer)) for layer in range(12)}, {})
"""12 MiB: two groups of tensors."""

Opener = Callable[..., MooncakeStore]


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[MooncakeCluster]:
    if missing():
        pytest.skip(missing())
    with MooncakeCluster(tmp_path, segment_bytes=64 << 20, lease_ms=200) as cluster:
        yield cluster


@pytest.fixture
def open_own(own_cluster: MooncakeCluster, tmp_path: Path) -> Iterator[Opener]:
    with ExitStack() as after:

        def opened(timeout_ms: int, transfer_ms: int, port: int | None = None) -> MooncakeStore:
            settings = MooncakeSettings(
                "127.0.0.1",
                port or own_cluster.port,
                timeout_ms,
                transfer_ms,
                tmp_path / "secret",
                buffer_bytes=64 << 20,
            )
            store = MooncakeStore(settings, 1 << 30, first_rest_s=0.1)
            after.callback(store.close)
            return store

        yield opened


def request(store: MooncakeStore, key: str) -> bool:
    """Do what a request does: look, wait for all layers, store if there is nothing. Return whether it hit."""
    found = store.get(key)
    if found is not None:
        try:
            for layer in range(12):
                assert float(found.tensors[f"k.{layer}"][7, 7]) == layer
            return True
        except DamagedEntryError:
            pass
    with contextlib.suppress(StoreError):
        store.put(key, VALUE)
    return False


def eventually_hits(store: MooncakeStore) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if request(store, "after"):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_master_is_killed_and_restarted(own_cluster: MooncakeCluster, open_own: Opener) -> None:
    store = open_own(2000, 5000)
    assert not request(store, "a")
    assert request(store, "a")
    own_cluster.kill("master")
    assert [request(store, "a") for _ in range(5)] == [False] * 5
    assert store.stats().failures == 1
    own_cluster.start_master()
    assert eventually_hits(store)


@pytest.mark.slow
def test_storage_is_killed_and_restarted(own_cluster: MooncakeCluster, open_own: Opener) -> None:
    store = open_own(2000, 5000)
    assert not request(store, "a")
    own_cluster.kill("storage")
    assert [request(store, "a") for _ in range(5)] == [False] * 5
    own_cluster.start_storage()
    assert eventually_hits(store)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["master", "storage"])
def test_a_process_hangs(own_cluster: MooncakeCluster, open_own: Opener, name: str) -> None:
    store = open_own(200, 500)
    patient = open_own(5000, 10_000)
    assert not request(patient, "a")
    own_cluster.pause(name)
    # It hangs until the requests are through, so none of them waits for it.
    assert [request(store, "a") for _ in range(20)] == [False] * 20
    assert store.stats().failures > 0
    own_cluster.resume(name)
    assert eventually_hits(patient)


@pytest.mark.slow
def test_a_network_that_swallows(own_cluster: MooncakeCluster, open_own: Opener) -> None:
    with Proxy(own_cluster.port) as proxy:
        store = open_own(500, 2000, proxy.port)
        proxy.swallows = True
        assert [request(store, "a") for _ in range(20)] == [False] * 20
        assert store.stats().failures > 0
        proxy.swallows = False
        store.close()


@pytest.mark.slow
def test_a_slow_network(own_cluster: MooncakeCluster, open_own: Opener) -> None:
    with Proxy(own_cluster.port) as proxy:
        patient, hasty = open_own(20_000, 20_000, proxy.port), open_own(100, 20_000, proxy.port)
        proxy.delay_s = 0.06  # each way: two round trips to the master take longer than 100 ms
        assert not request(patient, "a")
        assert request(patient, "a")
        assert patient.stats().failures == 0
        assert not request(hasty, "a")
        assert hasty.stats().failures == 1
        patient.close()
        hasty.close()
