"""Short forms of the stress: worker threads in this process, over memory and over a damaged folder."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlcache_fx.bench.stress.fleet import Fleet
from vlcache_fx.bench.stress.result import StressResult
from vlcache_fx.bench.stress.run import disturb, run_stress
from vlcache_fx.bench.stress.settings import StressSettings
from vlcache_fx.bench.stress.worker import work

from ..runtime.helpers import own_compiler_state

SECONDS = 2.0


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> StressSettings:
    ledger = tmp_path_factory.mktemp("stress") / "ledger"
    return StressSettings(
        stores=("memory://?capacity=60KiB",),
        ledger=str(ledger),
        threads=3,
        models=("tiny",),
        clear_share=0.05,
        reopen_share=0.02,
        folder_fault_s=0.1,
        in_place=False,
    )


@pytest.fixture(scope="module")
def fleet(settings: StressSettings) -> Iterator[Fleet]:
    with own_compiler_state():
        made = Fleet(settings)
        made.warm_up()
        yield made
        made.close()


def stress(fleet: Fleet, settings: StressSettings) -> StressResult:
    """Work for ``SECONDS`` in this process."""
    events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    ended, result = threading.Event(), StressResult()
    fleet.use(settings)
    helpers = [
        threading.Thread(target=disturb, args=(settings, events, ended)),
        threading.Thread(target=lambda: (time.sleep(SECONDS), ended.set())),
    ]
    for helper in helpers:
        helper.start()
    assert work(fleet, settings, "test", ended, lambda event: events.put(dict(event)))
    for helper in helpers:
        helper.join()
    while not events.empty():
        event = events.get()
        if event["event"] != "start":
            result.add(event)
    return result


def check(result: StressResult) -> None:
    assert result.problems == []
    assert result.is_clean
    assert result.compared
    assert result.modes["warm"]
    assert result.faults.total()


def test_threads_share_memory(fleet: Fleet, settings: StressSettings) -> None:
    check(stress(fleet, settings))


def test_threads_share_a_damaged_folder(fleet: Fleet, settings: StressSettings, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    stores = ("memory://?capacity=60KiB", f"file://{folder}?capacity=400KiB")
    result = stress(fleet, replace(settings, stores=stores, folder=str(folder)))
    check(result)
    assert result.bound_samples
    assert 0 < result.largest_folder_bytes <= 400 << 10


@pytest.mark.thorough
def test_processes_that_are_killed(settings: StressSettings, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    stores = ("memory://?capacity=60KiB", f"file://{folder}?capacity=400KiB")
    changed = replace(
        settings, stores=stores, folder=str(folder), seconds=8, kill_s=2, ledger=str(tmp_path / "ledger")
    )
    result = run_stress(changed)
    check(result)
    assert result.killed
