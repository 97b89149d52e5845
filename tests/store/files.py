"""Helpers for tests of file stores: entries, their files, and other processes."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlcache_fx.store import Entry
from vlcache_fx.store.file_folder import Folder


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


def start(code: str, *args: object) -> subprocess.Popen[str]:
    """Run code in another interpreter, with helpers imported and ``args`` as strings."""
    head = (
        "import os, sys, time, torch\n"
        "from pathlib import Path\n"
        "from vlcache_fx.store.file import FileStore\n"
        "from vlcache_fx.errors import *\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from files import *\n"
        "args = sys.argv[1:]\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    """Wait for a process that must succeed; return what it printed."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out
