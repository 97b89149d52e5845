"""A cluster of ``vlcache serve --replicas`` in processes of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil

READY_S = 400
STOPPED_S = 60
READY = re.compile(r"pid=(\d+)\)\S* replica (\w+) is ready")


class Cluster:
    """A cluster that runs.

    Attributes:
        process: the command.
        url: where it listens.
        lines: what it has printed.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.url = process, ""
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            self.lines.extend(lines)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    @property
    def pids(self) -> dict[str, int]:
        """Name -> process of the replicas that were ever ready."""
        return {match[2]: int(match[1]) for match in READY.finditer(self.text)}

    def health(self) -> list[str]:
        """The replicas that answer."""
        return sorted(httpx2.get(f"{self.url}/health", timeout=30).json()["replicas"])

    def wait_until(self, is_true: Callable[[], bool], timeout_s: float = READY_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_true():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, f"it does not happen:\n{self.text}"
            time.sleep(0.2)

    def stop(self) -> int:
        """Stop it as an operator does; return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(STOPPED_S)
        self._reader.join(10)
        return status

    def kill(self) -> None:
        """End whatever is left."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            process.kill()
        self.process.wait(STOPPED_S)
        self._reader.join(10)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from vlcache_fx.cli import app; app()", "serve", *arguments]


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[Cluster]:
    """Run ``vlcache serve reference --replicas ...`` until the end of the body."""
    given = ("reference", "--port", "0", "--lowering", "eager", "--batch-size", "1", *arguments)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(folder), "RAY_COLOR_PREFIX": "0"}
    process = subprocess.Popen(
        command(*given),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    found = Cluster(process)
    try:
        found.wait_until(lambda: "starting" in found.text)
        address = re.search(r"replicas behind (\S+)", found.text)
        assert address is not None, found.text
        found.url = address[1]
        found.wait_until(lambda: "(ready after" in found.text)
        yield found
    finally:
        if process.poll() is None:
            found.kill()
