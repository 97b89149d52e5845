"""Helpers for tests of file stores: entries, their files, and other processes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from vlcache_fx.store import Entry
from vlcache_fx.store.file.folder import Folder


def entry(nbytes: int = 4096, mark: int = 0, **info: float) -> Entry:
    """An entry of two tensors, ``nbytes`` together, whose bytes depend on ``mark``."""
    values = (torch.arange(nbytes) * 7 + mark).to(torch.uint8)
    half = nbytes // 2
    return Entry({"key 1": values[:half], "value 0": values[half:]}, {"mark": mark, **info})


def same(got: Entry | None, expected: Entry) -> bool:
    """Return whether two entries are equal; reads all tensors of ``got``."""
    return (
        got is not None
        and list(got.tensors) == list(expected.tensors)
        and dict(got.info) == dict(expected.info)
        and all(torch.equal(got.tensors[name], tensor) for name, tensor in expected.tensors.items())
    )


def file_of(directory: Path, key: str) -> Path:
    """The file of an entry."""
    return Folder(directory).path_of(key)


def bytes_on_disk(directory: Path) -> int:
    """Bytes of all files that count towards the bound, while no file is renamed or removed."""
    connection = sqlite3.connect(directory / "index.sqlite", timeout=60, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        total = 0
        for part in ("entries", "writing", "damaged"):
            for path in (directory / part).rglob("*"):
                # A writer that gave up removes its file at any time.
                with contextlib.suppress(FileNotFoundError):
                    total += path.stat().st_size if path.is_file() else 0
        connection.execute("ROLLBACK")
        return total
    finally:
        connection.close()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The log's lines, taken."""
    found = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    return found


_FORKING = """
import contextlib, json, logging, os, signal, sys, time, traceback
from pathlib import Path
import torch
from vlcache_fx.errors import *
from vlcache_fx.store.file import FileStore
sys.path.insert(0, sys.argv[1])
from files import *
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
logging.getLogger("vlcache_fx").addHandler(logging.NullHandler())
for line in sys.stdin:
    code, args, out = json.loads(line)
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.stdout = sys.stderr = open(out, "w", buffering=1)
    failed = 1
    try:
        exec(code, globals())
        failed = 0
    except SystemExit:
        failed = 0
    except BaseException:
        traceback.print_exc()
    print(f"exit {failed}")
    os._exit(failed)
"""


@functools.cache
def _forking() -> subprocess.Popen[str]:
    """A process that has imported torch, which takes seconds, and forks the others."""
    command = [sys.executable, "-c", _FORKING, str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def stop() -> None:
        process.kill()
        process.communicate()

    atexit.register(stop)
    return process


class Child:
    """Another process, which runs code with the names of this module, ``FileStore`` and ``args``."""

    def __init__(self, code: str, args: tuple[str, ...]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._out = Path(self._folder.name) / "out"
        forking = _forking()
        assert forking.stdin is not None
        assert forking.stdout is not None
        forking.stdin.write(json.dumps([code, args, str(self._out)]) + "\n")
        forking.stdin.flush()
        self.pid = int(forking.stdout.readline())

    def wait_for(self, text: str) -> None:
        """Wait until the process has printed ``text``."""
        while text not in self._printed():
            assert self._is_alive(), self._printed()
            time.sleep(0.005)

    def kill(self) -> None:
        """Send SIGKILL, and wait."""
        os.kill(self.pid, signal.SIGKILL)
        self.output(None)

    def output(self, status: int | None = 0) -> str:
        """Wait for the end; return what was printed."""
        while self._is_alive():
            time.sleep(0.005)
        printed = self._printed()
        self._folder.cleanup()
        end = f"exit {status}\n"
        assert status is None or printed.endswith(end), printed
        return printed.removesuffix(end)

    def _printed(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    def _is_alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


def start(code: str, *args: object) -> Child:
    """Run code in another process."""
    return Child(code, tuple(map(str, args)))
