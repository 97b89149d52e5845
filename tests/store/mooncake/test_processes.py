"""Processes that share a Mooncake Store: engines, and how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlcache_fx.testing.mooncake_cluster import MooncakeCluster, missing

HERE = Path(__file__).parent


def url_of(cluster: MooncakeCluster, secret_file: Path) -> str:
    return cluster.url(f"buffer=64MiB&timeout_ms=20000&transfer_ms=20000&secret_file={secret_file}")


def started(url: str, *questions: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error::ResourceWarning", str(HERE / "engine_process.py"), url]
    return subprocess.Popen(
        [*command, *map(str, questions)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def report_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    report: dict[str, Any] = json.loads(process.stdout.readline())
    return report


@pytest.mark.slow
def test_a_second_engine_process_needs_no_cold_run(cluster: MooncakeCluster, secret_file: Path) -> None:
    url = url_of(cluster, secret_file)
    modes = []
    for questions in [(1,), (2, 3)]:
        with started(url, *questions) as process:
            out, _ = process.communicate("\n" * 5, timeout=300)
            assert process.returncode == 0
        *reports, calls = map(json.loads, out.splitlines())
        assert max(report["distance"] for report in reports) <= 1e-5
        modes.append([report["mode"] for report in reports])
        assert calls["bypass"] == 0
    assert modes == [["cold"], ["warm", "warm"]]
    assert reports[0]["tiers"] == ["mooncake"]


# test_outages.py kills the master under requests, and the test above shares donors between engines.
@pytest.mark.slow
@pytest.mark.thorough
def test_two_engine_processes_survive_the_master(tmp_path: Path) -> None:
    """It is killed between two requests, and is dead when the processes end."""
    if missing():
        pytest.skip(missing())
    with MooncakeCluster(tmp_path, segment_bytes=64 << 20) as cluster:
        url = url_of(cluster, tmp_path / "secret")
        with started(url, 1, 2, 3) as first, started(url, 4, 5, 6) as second:
            before = [report_of(process) for process in (first, second)]
            cluster.kill("master")
            for process in (first, second):
                out, _ = process.communicate("\n" * 5, timeout=300)
                *after, calls = map(json.loads, out.splitlines())
                assert len(after) == 2  # no request was lost
                assert max(report["distance"] for report in [*before, *after]) <= 1e-5
                assert calls["bypass"] == 0
                assert process.returncode == 0


ENDS = {
    "with an entry on its way": "found = store.get('a'); assert found is not None",
    "while the tier connects again": "os.kill(master, 9); assert store.get('a') is None; time.sleep(0.3)",
    "while the master hangs": "os.kill(master, 19); assert store.get('a') is None; store.close()",
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_processes_end_with_code_0(tmp_path: Path, end: str) -> None:
    """Without a word of native threads, and without waiting for a master that is dead or hangs."""
    if missing():
        pytest.skip(missing())
    with MooncakeCluster(tmp_path, segment_bytes=64 << 20) as cluster:
        code = f"""
import os, time, torch
from vlcache_fx.store import Entry, open_store
store = open_store({url_of(cluster, tmp_path / "secret").replace("20000", "1000")!r}, 1 << 26)
master = {cluster.pid("master")}
assert store.put('a', Entry({{'k': torch.ones(1000, 1000)}}, {{}})) and store.flush(60)
{end}
"""
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not [line for line in done.stderr.splitlines() if "going on without it" not in line]
