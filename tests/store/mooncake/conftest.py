"""A real Mooncake Store for the tests of a file, and an imitation with faults to order."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from vlcache_fx.store.mooncake import MooncakeSettings, MooncakeStore
from vlcache_fx.store.url import parse_url
from vlcache_fx.testing.mooncake_cluster import MooncakeCluster, missing

LEASE_MS = 200

Opener = Callable[..., MooncakeStore]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakeCluster]:
    if missing():
        pytest.skip(missing())
    with MooncakeCluster(tmp_path_factory.mktemp("mooncake"), lease_ms=LEASE_MS) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def secret_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secret") / "secret"


@pytest.fixture
def open_real(cluster: MooncakeCluster, secret_file: Path) -> Iterator[Opener]:
    """Open stores in the cluster; entries are dropped and stores closed after the test."""
    with ExitStack() as after:

        def opened(
            parameters: str = "transfer_ms=10000&timeout_ms=5000",
            capacity_bytes: int = 64 << 20,
            port: int | None = None,
            secret: Path = secret_file,
        ) -> MooncakeStore:
            url = cluster.url(f"buffer=64MiB&secret_file={secret}&{parameters}", port)
            settings = MooncakeSettings.from_url(parse_url(url))
            store = MooncakeStore(settings, capacity_bytes, first_rest_s=0.1)
            after.callback(store.close)
            return store

        yield opened
    store = MooncakeStore(
        MooncakeSettings("127.0.0.1", cluster.port, 5000, 10_000, secret_file, buffer_bytes=8 << 20), 1
    )
    store.clear()
    store.close()


@dataclass(frozen=True)
class Imitation:
    """A folder of values, and a store that reads it."""

    folder: Path
    open: Opener

    def fault(self, operation: str, kind: str) -> None:
        """Make the next call fail: a code, ``hang`` or ``exit``."""
        (self.folder / f"fault-{operation}").write_text(kind)

    def heal(self) -> None:
        """Take all faults away."""
        for path in self.folder.glob("fault-*"):
            path.unlink(missing_ok=True)


@pytest.fixture
def imitation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Imitation]:
    folder = tmp_path / "values"
    folder.mkdir()
    monkeypatch.setenv("IMITATION_FOLDER", str(folder))
    monkeypatch.syspath_prepend(Path(__file__).parent / "imitation")
    for name in [name for name in sys.modules if name.partition(".")[0] == "mooncake"]:
        monkeypatch.delitem(sys.modules, name)
    with ExitStack() as after, socket.create_server(("127.0.0.1", 0), backlog=100) as master:

        def opened(
            timeout_ms: int = 5000, transfer_ms: int = 10_000, capacity_bytes: int = 1 << 20, **other: int
        ) -> MooncakeStore:
            port = master.getsockname()[1]
            values = {"buffer_bytes": 8 << 20, **other}
            settings = MooncakeSettings(
                "127.0.0.1", port, timeout_ms, transfer_ms, tmp_path / "secret", **values
            )
            store = MooncakeStore(settings, capacity_bytes, first_rest_s=0.05)
            after.callback(store.close)
            return store

        yield Imitation(folder, opened)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mooncake"]:
        del sys.modules[name]
