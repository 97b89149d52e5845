"""A Mooncake Store on 127.0.0.1, in processes of its own: for tests and examples."""

from __future__ import annotations

import contextlib
import functools
import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

START_S = 30.0
"""How long a process may take to be ready."""


@functools.cache
def missing() -> str:
    """Return why no Mooncake Store can be started here, naming what is missing; empty if it can."""
    spec = importlib.util.find_spec("mooncake")
    if spec is None or not spec.submodule_search_locations:
        return "needs the package mooncake-transfer-engine-non-cuda (the extra mooncake-cpu)"
    started = subprocess.run(  # noqa: S603 - nothing in it comes from outside
        [_program("mooncake_client"), "--version"], capture_output=True, text=True, check=False
    )
    if "shared libraries" in started.stderr:
        library = started.stderr.partition("libraries: ")[2].partition(":")[0]
        return f"needs {library}: Debian packages libibverbs1 librdmacm1 libnuma1 libcurl4"
    return ""


class MooncakeCluster:
    """A master and one process that stores, both on free ports of 127.0.0.1.

    Ports that Mooncake chooses itself for transfers listen on all interfaces; 0.3.13 has no option for that.

    Args:
        folder: for logs.
        segment_bytes: how much is stored, at least 16 MiB.
        lease_ms: how long a value that was read cannot be evicted.
    """

    def __init__(self, folder: Path, segment_bytes: int = 256 << 20, lease_ms: int = 1000) -> None:
        self._folder, self._segment_bytes, self._lease_ms = folder, segment_bytes, lease_ms
        self.port, self.admin_port, self._storage_port = _free_ports(3)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: list[IO[bytes]] = []

    def url(self, parameters: str = "", port: int | None = None) -> str:
        """Return a URL of the store, with parameters such as ``timeout_ms=100&transfer_ms=1000``."""
        return f"mooncake://127.0.0.1:{port or self.port}" + (f"?{parameters}" if parameters else "")

    def start_master(self) -> None:
        """Start the master, and wait until it answers."""
        self._start(
            "master",
            "mooncake_master",
            "--rpc_address=127.0.0.1",
            f"--rpc_port={self.port}",
            "--metrics_host=127.0.0.1",
            f"--metrics_port={self.admin_port}",
            f"--default_kv_lease_ttl={self._lease_ms}",
        )
        _await(lambda: b"ok" in self._ask("/health"), "the master")

    def start_storage(self) -> None:
        """Start the process that stores, and wait until the master knows it."""
        self._start(
            "storage",
            "mooncake_client",
            "--host=127.0.0.1",
            f"--port={self._storage_port}",
            f"--master_server_address=127.0.0.1:{self.port}",
            "--metadata_server=P2PHANDSHAKE",
            f"--global_segment_size={self._segment_bytes}",
        )
        _await(lambda: self._ask("/get_all_segments").strip() != b"", "the storage")

    def pid(self, name: str) -> int:
        """Return the process id of ``master`` or ``storage``."""
        return self._processes[name].pid

    def kill(self, name: str) -> None:
        """Kill ``master`` or ``storage``."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def pause(self, name: str) -> None:
        """Stop ``master`` or ``storage`` as if it hung."""
        self._processes[name].send_signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """Let it go on."""
        self._processes[name].send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill all processes."""
        for name in list(self._processes):
            self.kill(name)
        for log in self._logs:
            log.close()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self.start_master()
            self.start_storage()
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, name: str, program: str, *arguments: str) -> None:
        log = (self._folder / f"{name}.log").open("ab")
        self._logs.append(log)
        self._processes[name] = subprocess.Popen(  # noqa: S603 - nothing in it comes from outside
            [_program(program), "--logtostderr", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "MC_TCP_BIND_ADDRESS": "127.0.0.1"},
        )

    def _ask(self, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.admin_port, timeout=1)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return b""
        finally:
            connection.close()


def _await(is_ready: Callable[[], bool], name: str) -> None:
    deadline = time.monotonic() + START_S
    while not is_ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name} of the Mooncake Store is not ready after {START_S:g} s")
        time.sleep(0.02)


def _program(name: str) -> str:
    spec = importlib.util.find_spec("mooncake")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return str(Path(next(iter(spec.submodule_search_locations))) / name)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as sockets:
        bound = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in bound:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in bound]
