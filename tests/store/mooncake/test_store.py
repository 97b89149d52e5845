"""Entries in a real Mooncake Store: shared, authenticated, refined, listed and cleared."""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlcache_fx.errors import DamagedEntryError, StoreError
from vlcache_fx.keys.entry_key import KeyScope, Selection
from vlcache_fx.store import Entry, MooncakeSettings, MooncakeStore, open_store
from vlcache_fx.store.mooncake import values
from vlcache_fx.testing.mooncake_cluster import MooncakeCluster, missing

from .conftest import LEASE_MS, Opener

TRANSFER = "vlcache-mooncake-transfer"
"""Name of the threads that read entries."""


def donor(value: float, contexts: int, layers: int = 4, rows: int = 100) -> Entry:
    tensors = {f"k.{layer}": torch.full((rows, 8), value) for layer in range(layers)}
    return Entry(tensors, {"contexts": [f"{value} {index}" for index in range(contexts)]})


def values_of(store: MooncakeStore, key: str) -> set[float]:
    found = store.get(key)
    return set() if found is None else {float(tensor.mean()) for tensor in found.tensors.values()}


def raw(cluster: MooncakeCluster, *words: str) -> list[str]:
    command = [sys.executable, "-P", str(Path(__file__).with_name("raw.py")), str(cluster.port), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.split("\n")


def names_in(cluster: MooncakeCluster) -> set[str]:
    connection = http.client.HTTPConnection("127.0.0.1", cluster.admin_port, timeout=10)
    connection.request("GET", "/get_all_keys")
    names = connection.getresponse().read().decode().split()
    connection.close()
    return set(names) - {"vlcache-secret"}


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_two_clients_share_entries(open_real: Opener) -> None:
    first, second = open_real(), open_real()
    generator = torch.Generator().manual_seed(0)
    tensors = {f"k.{i}": torch.randn(100 + i, 4096, generator=generator).half() for i in range(20)}
    assert first.put("a", Entry(tensors, {"length": 7}))
    found = second.get("a")
    assert found is not None
    assert found.info == {"length": 7}
    for name, tensor in tensors.items():
        assert torch.equal(found.tensors[name], tensor)
    own = found.materialized()
    del found
    assert torch.equal(own.tensors["k.3"], tensors["k.3"])
    assert "a" in second
    assert second.get("b") is None
    assert (second.stats().hits, second.stats().misses, second.stats().failures) == (1, 1, 0)


def test_url_opens_the_store(cluster: MooncakeCluster, secret_file: Path) -> None:
    url = cluster.url(f"capacity=3MiB&buffer=8MiB&timeout_ms=5000&secret_file={secret_file}")
    store = open_store(["memory://", url], 1 << 20)
    stats = store.stats()
    assert [(part.tier, part.capacity_bytes) for part in stats.tiers] == [
        ("memory", 1 << 20),
        ("mooncake", 3 << 20),
    ]
    store.close()


def test_wrong_secret(open_real: Opener, tmp_path: Path) -> None:
    assert open_real().put("a", donor(1.0, 1))
    with pytest.raises(StoreError, match=r"mooncake://127.0.0.1:\d+: wrong secret"):
        open_real(secret=tmp_path / "another")


def test_nothing_listens(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nothing answers at mooncake://127.0.0.1:1: Connection refused"):
        MooncakeStore(MooncakeSettings("127.0.0.1", 1, secret_file=tmp_path / "secret"), 1)


def test_something_else_listens(
    tmp_path: Path, cluster: MooncakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlcache_fx.store.mooncake.client.START_S", 1.0)
    settings = MooncakeSettings("127.0.0.1", cluster.admin_port, secret_file=tmp_path / "secret")
    with pytest.raises(StoreError, match=f"cannot connect to Mooncake at 127.0.0.1:{cluster.admin_port}"):
        MooncakeStore(settings, 1)


def test_refined_donors_replace_those_of_fewer_contexts(cluster: MooncakeCluster, open_real: Opener) -> None:
    first, second = open_real(), open_real()
    assert first.put("a", donor(1.0, 1))
    assert values_of(second, "a") == {1.0}
    assert second.put("a", donor(2.0, 2))
    assert values_of(first, "a") == {2.0}
    assert first.put("a", donor(1.5, 1))  # fewer contexts change nothing
    assert values_of(second, "a") == {2.0}
    assert first.put("a", donor(4.0, 4))
    assert values_of(second, "a") == {4.0}
    assert second.put("a", donor(4.5, 4))  # as many: the latest
    assert values_of(first, "a") == {4.5}
    assert {name for name in names_in(cluster) if name.startswith("vlcache1.")} == {"vlcache1.a.4"}


def test_unread_tensors_of_older_donors_are_removed(cluster: MooncakeCluster, open_real: Opener) -> None:
    store = open_real()
    assert store.put("a", donor(1.0, 1))
    time.sleep(2 * LEASE_MS / 1000)  # writing an entry asks for its tensors, and so leases them
    assert store.put("a", donor(2.0, 2))
    assert len(names_in(cluster)) == 1 + 4
    before = names_in(cluster)
    assert store.put("a", donor(2.0, 2))  # the same again is not written
    assert names_in(cluster) == before


def test_a_donor_of_another_structure_replaces_a_refined_one(open_real: Opener) -> None:
    store = open_real()
    for contexts in (1, 2, 3):
        assert store.put("a", donor(float(contexts), contexts))
    assert store.put("a", donor(9.0, 1, layers=2))
    found = store.get("a")
    assert found is not None
    assert len(found.tensors) == 2
    assert values_of(store, "a") == {9.0}


def replaced_once_found(monkeypatch: pytest.MonkeyPatch, replace: Callable[[], object]) -> None:
    """Let another process replace the next entry that is found, before its tensors are read."""
    find = values.find

    def found(*args: Any) -> Any:
        monkeypatch.setattr(values, "find", find)
        manifest, damaged = find(*args)
        replace()
        return manifest, damaged

    monkeypatch.setattr(values, "find", found)


def test_a_reader_leaves_what_replaced_its_entry(
    cluster: MooncakeCluster, open_real: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = open_real(), open_real()
    assert writer.put("a", donor(1.0, 2))
    old = {name for name in names_in(cluster) if name.startswith("vlcache1p.")}

    def replace() -> None:
        raw(cluster, *(word for name in old for word in ("remove", name)))
        assert writer.put("a", donor(2.0, 2))

    replaced_once_found(monkeypatch, replace)
    entry = reader.get("a")
    assert entry is not None
    with pytest.raises(DamagedEntryError, match="is no longer stored"):
        entry.wait()
    assert eventually(lambda: not any(thread.name == TRANSFER for thread in threading.enumerate()))
    assert values_of(reader, "a") == {2.0}


def test_a_writer_leaves_a_better_entry_that_was_put_meanwhile(
    open_real: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = open_real(), open_real()
    assert first.put("a", donor(1.0, 2))
    replaced_once_found(monkeypatch, lambda: first.put("a", donor(3.0, 3)))
    assert second.put("a", donor(2.0, 2))
    assert values_of(second, "a") == {3.0}


def test_eviction_leaves_what_replaced_an_entry(open_real: Opener) -> None:
    size = donor(1.0, 2).nbytes
    first, second = open_real(capacity_bytes=size), open_real()
    assert first.put("a", donor(1.0, 2))
    assert second.put("a", donor(2.0, 2))
    assert first.put("b", donor(3.0, 2))
    assert first.stats().evictions == 1
    assert values_of(second, "a") == {2.0}


@pytest.mark.slow
def test_two_processes_refine_at_once(cluster: MooncakeCluster, open_real: Opener, secret_file: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("refiner.py"))]
    arguments = [cluster.url(f"buffer=64MiB&timeout_ms=20000&transfer_ms=20000&secret_file={secret_file}")]
    writers = [
        subprocess.Popen([*command, *arguments, writer], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for writer in ("100", "200")
    ]
    for writer in writers:  # both are ready before either begins
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(b"go\n")
        writer.stdin.flush()
    store, seen = open_real(), set()
    while any(writer.poll() is None for writer in writers):
        for key in ("a", "b", "c"):
            try:
                values = values_of(store, key)
            except DamagedEntryError:
                continue  # it was replaced while it was read: a miss
            assert len(values) <= 1, "a mixture of two writers"
            seen |= values
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert seen
    for key in ("a", "b", "c"):
        (value,) = values_of(store, key)
        assert value in (104.0, 204.0)  # the largest number of contexts, of either
    assert store.stats().failures == 0


def test_planted_entries_are_misses(
    cluster: MooncakeCluster, open_real: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_real()
    assert store.put("a", donor(1.0, 1))
    (good,) = [bytes.fromhex(line) for line in raw(cluster, "get", "vlcache1.a.1") if line]
    raw(
        cluster,
        *("put", "vlcache1.b.1", good.hex()),  # the entry of another key
        *("put", "vlcache1.a.3", good.hex()),  # a better rank
        *("put", "vlcache1.c.0", good[:-1].hex()),
        *("put", "vlcache1.d.0", (b"0" * 64 + b"{}").hex()),
        *("put", "vlcache1.e.0", (b"x" * 40_000).hex()),
    )
    assert [store.get(key) for key in "bcde"] == [None] * 4
    assert values_of(store, "a") == {1.0}
    assert eventually(lambda: not any(name.startswith("vlcache1.b") for name in names_in(cluster)))
    assert len([record for record in caplog.records if "counts as a miss" in record.getMessage()]) == 5
    assert store.stats().damaged == 5
    caplog.clear()
    assert [store.get(key) for key in "bcde"] == [None] * 4
    assert not caplog.records


def test_a_planted_tensor_is_a_miss(
    cluster: MooncakeCluster, open_real: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_real()
    assert store.put("a", donor(1.0, 1))
    (name,) = [name for name in names_in(cluster) if name.startswith("vlcache1p.a.") and name.endswith(".2")]
    nbytes = 100 * 8 * 4
    assert eventually(lambda: raw(cluster, "remove", name)[0] == "0")  # its lease must end
    raw(cluster, "put", name, "00" * nbytes)
    found = store.get("a")
    assert found is not None
    with pytest.raises(DamagedEntryError, match=r"'k.2' are not those that were stored"):
        found.wait()
    assert eventually(lambda: not names_in(cluster))
    assert store.get("a") is None
    assert len(caplog.records) == 1


def test_clear_drops_the_entries_of_a_tenant_in_all_processes(open_real: Opener) -> None:
    scopes = [KeyScope(salt, "f" * 64) for salt in ("one", "two")]
    keys = [scope.with_digest("donor", str(index) * 64) for scope in scopes for index in range(3)]
    first, second = open_real(), open_real()
    for key in keys:
        assert first.put(key, donor(1.0, 1))
    assert all(second.get(key) for key in keys)  # and so their leases are fresh
    assert second.clear(Selection(salt="one")) == 3
    assert [key in first for key in keys] == [False] * 3 + [True] * 3
    assert second.clear(Selection(key=keys[3])) == 1
    assert second.clear(Selection(key="no key")) == 0
    assert first.clear() == 2
    assert first.stats().entries == 0
    assert (first.stats().removals, second.stats().removals) == (2, 4)
    assert not any(key in second for key in keys)
    open_real().close()  # the check of the secret is still there


def test_entries_lists_own_or_all(cluster: MooncakeCluster, open_real: Opener) -> None:
    parameters = "timeout_ms=5000&transfer_ms=5000"
    first, second = open_real(parameters), open_real(f"{parameters}&admin_port={cluster.admin_port}")
    assert first.put("a", donor(1.0, 1))
    assert first.put("a", donor(1.0, 2))
    assert second.put("b", Entry({"k": torch.ones(3)}, {"length": 3}))
    assert [(info.key, info.nbytes) for info in first.entries()] == [("a", 4 * 100 * 8 * 4)]
    listed = {info.key: info for info in second.entries()}
    assert {key: info.nbytes for key, info in listed.items()} == {"a": 4 * 100 * 8 * 4, "b": 12}
    assert listed["b"].info == {"length": 3}
    assert listed["b"].used_at > 0
    assert listed["a"].tier == "mooncake"
    assert first.evicted("a") is None


def test_listing_without_the_http_server(open_real: Opener) -> None:
    with pytest.raises(StoreError, match=r"HTTP server at 127.0.0.1:1 does not answer"):
        list(open_real("timeout_ms=5000&admin_port=1").entries())


def is_stored(store: MooncakeStore, key: str, entry: Entry) -> bool:
    try:
        return store.put(key, entry)
    except StoreError as error:
        if "is full" not in str(error):
            raise
        return False


def test_a_full_segment(tmp_path: Path, secret_file: Path) -> None:
    """Fill it again and again: what is stored is right, what is not is refused, and nothing fails."""
    if missing():
        pytest.skip(missing())
    with MooncakeCluster(tmp_path, segment_bytes=32 << 20, lease_ms=200) as small:
        settings = MooncakeSettings("127.0.0.1", small.port, 5000, 3000, secret_file, buffer_bytes=80 << 20)
        store = MooncakeStore(settings, 1 << 30)
        stored = [is_stored(store, f"key{i}", donor(float(i), 1, rows=32768)) for i in range(16)]  # 64 MiB
        assert any(stored)
        for index in range(16):
            found = store.get(f"key{index}")
            if found is not None:
                try:
                    assert {float(tensor.mean()) for tensor in found.tensors.values()} == {float(index)}
                except DamagedEntryError:
                    continue  # some of its tensors were evicted
        stats = store.stats()
        assert stats.damaged == 0
        assert (stats.admissions, stats.failures) == (stored.count(True), stored.count(False))
        assert not is_stored(store, "whole", donor(1.0, 1, rows=2**19))  # 64 MiB in one entry
        store.close()
