"""A worker of a stress run: threads that call models which share a store."""

from __future__ import annotations

import contextvars
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vlcache_fx.bench.stress.fleet import Answer, Fleet
from vlcache_fx.bench.stress.requests import Call, draw_calls, make_pool
from vlcache_fx.bench.stress.settings import StressSettings

Event = Mapping[str, Any]
Emit = Callable[[Event], None]

SAMPLE_S = 0.02
"""Seconds between two looks at the bounds."""
PATIENCE_S = 30.0
"""Seconds after the end in which the last requests must end."""
LONGEST_TEXT = 2500
"""Characters of an error that are kept: pipes write no more than 4,096 bytes at once."""


def work(fleet: Fleet, settings: StressSettings, label: str, ended: threading.Event, emit: Emit) -> bool:
    """Call the models from threads until ``ended``; emit what happens, from any thread.

    Args:
        fleet: the models, warmed up.
        settings: of the run.
        label: names the worker; requests and faults depend on it.
        ended: set when no more requests shall begin.
        emit: called with events.

    Returns:
        False if a request did not end within ``PATIENCE_S`` seconds.
    """
    fleet.open(label, lambda fault: emit({"event": "fault", "fault": fault}))
    emit({"event": "start", "label": label, "pid": os.getpid()})
    sampled = threading.Event()
    sampler = threading.Thread(target=_sample, args=(fleet, sampled, emit), daemon=True)
    threads = [
        threading.Thread(
            # Torch's settings are per context, and threads begin without.
            target=contextvars.copy_context().run,
            args=(_call_until, ended, fleet, _calls(settings, f"{label}-{number}"), emit),
            daemon=True,
        )
        for number in range(settings.threads)
    ]
    for thread in (sampler, *threads):
        thread.start()
    ended.wait()
    deadline = time.monotonic() + PATIENCE_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    stacks = _stacks(threads)
    for stack in stacks:
        emit({"event": "failure", "error": f"a request did not end: {stack[-LONGEST_TEXT:]}"})
    sampled.set()
    sampler.join()
    if not stacks:
        fleet.close()
    return not stacks


def _stacks(threads: list[threading.Thread]) -> list[str]:
    """Return where each living thread is."""
    frames = sys._current_frames()
    return [
        "".join(traceback.format_stack(frames[thread.ident]))
        for thread in threads
        if thread.is_alive() and thread.ident in frames
    ]


def _calls(settings: StressSettings, label: str) -> Iterator[Call]:
    return draw_calls(
        make_pool(settings.seed, settings.models),
        f"{settings.seed}-{label}",
        settings.full_share,
        settings.clear_share,
        settings.reopen_share,
    )


def _call_until(ended: threading.Event, fleet: Fleet, calls: Iterator[Call], emit: Emit) -> None:
    while not ended.is_set():
        call = next(calls)
        try:
            answer = fleet.answer(call)
        except Exception:  # noqa: BLE001 - every failure of a request counts
            emit({"event": "failure", "error": f"{call}\n{traceback.format_exc()[-LONGEST_TEXT:]}"})
            continue
        emit(_event(answer, call))


def _event(answer: Answer, call: Call) -> Event:
    event: dict[str, Any] = {
        "event": "answer",
        "mode": answer.mode,
        "compared": answer.difference is not None,
        "difference": answer.difference or 0.0,
        "seconds": round(answer.seconds, 4),
    }
    return event | ({"wrong": f"{answer.wrong}: {call}"[:LONGEST_TEXT]} if answer.wrong else {})


def _sample(fleet: Fleet, sampled: threading.Event, emit: Emit) -> None:
    while not sampled.wait(SAMPLE_S):
        for tier, used, capacity in fleet.bounds():
            if used > capacity:
                emit({"event": "bound", "tier": tier, "used": used, "capacity": capacity})
