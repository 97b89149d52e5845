"""Runs worker processes, kills some, damages their folder, and watches its bound."""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vlcache_fx.bench.stress.folder_faults import FolderFaults, stored_bytes
from vlcache_fx.bench.stress.result import StressResult
from vlcache_fx.bench.stress.settings import StressSettings
from vlcache_fx.bench.stress.worker import PATIENCE_S
from vlcache_fx.bench.stress.workers import Events, Workers
from vlcache_fx.store.url import parse_url

SAMPLE_S = 0.05
"""Seconds between two measurements of the folder."""


def run_stress(
    settings: StressSettings, progress: Callable[[StressResult], None] = lambda _: None
) -> StressResult:
    """Run worker processes for ``settings.seconds`` once the models are compiled.

    Args:
        settings: what runs.
        progress: called often with the result so far.

    Raises:
        MeasurementError: the models cannot be compiled.
    """
    result = StressResult(processes=settings.processes, threads=settings.threads)
    events: Events = queue.SimpleQueue()
    workers, ended = Workers(settings, events), threading.Event()
    folder = threading.Thread(target=disturb, args=(settings, events, ended), daemon=True)
    start = time.monotonic()
    try:
        for number in range(settings.processes):
            workers.start(f"{number}-0")
        folder.start()
        _kill_until(start + settings.seconds, settings, workers, lambda: _take(events, result, progress))
        result.killed = len(workers.killed)
    finally:
        problem = workers.close(2 * PATIENCE_S)
        ended.set()
        folder.join()
    result.seconds = time.monotonic() - start
    if problem:
        events.put({"event": "failure", "error": problem})
    _take(events, result, progress)
    return result


def _kill_until(
    deadline: float, settings: StressSettings, workers: Workers, between: Callable[[], None]
) -> None:
    draw = random.Random(f"kills-{settings.seed}")  # noqa: S311 - no secret
    next_kill = time.monotonic() + settings.kill_s
    while (now := time.monotonic()) < deadline:
        between()
        time.sleep(min(SAMPLE_S, deadline - now))
        if settings.kill_s and now >= next_kill and workers.labels:
            next_kill = now + settings.kill_s
            label = draw.choice(workers.labels)
            workers.kill(label)
            workers.start(f"{label.partition('-')[0]}-{len(workers.killed)}")


def _take(events: Events, result: StressResult, progress: Callable[[StressResult], None]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            result.add(events.get_nowait())
    progress(result)


def disturb(settings: StressSettings, events: Events, ended: threading.Event) -> None:
    """Damage the folder of the file tier, if there is one, and watch its bound until ``ended``."""
    if not settings.folder:
        return
    folder, bound = Path(settings.folder), folder_bound(settings)
    faults = FolderFaults(folder, settings.seed, in_place=settings.in_place)
    last = time.monotonic()
    while not ended.wait(SAMPLE_S):
        used = stored_bytes(folder)
        events.put({"event": "folder", "used": used})
        if used > bound:
            events.put({"event": "bound", "tier": "folder", "used": used, "capacity": bound})
        if settings.folder_fault_s and time.monotonic() - last >= settings.folder_fault_s:
            last = time.monotonic()
            fault = faults.inject()
            if fault is not None:
                events.put({"event": "fault", "fault": fault})
    faults.close()


def folder_bound(settings: StressSettings) -> int:
    """Return the bound of the file tier in bytes."""
    for url in map(parse_url, settings.stores):
        if url.scheme == "file" and url.capacity_bytes:
            return url.capacity_bytes
    return settings.capacity_bytes
