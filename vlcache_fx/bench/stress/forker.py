"""The process from which workers are forked: ``python -m vlcache_fx.bench.stress.forker``.

It compiles the models once, so a killed worker is replaced at once. The first line of its standard input has
the settings, each further line the label of a worker to start; at the end of the input all workers end. It
and its workers print one event a line, as JSON. It has no threads, so that forks inherit no held locks.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading
import traceback
from collections.abc import Callable

import torch

from vlcache_fx.bench.stress.fleet import Fleet
from vlcache_fx.bench.stress.settings import StressSettings
from vlcache_fx.bench.stress.worker import LONGEST_TEXT, Emit, Event, work

POLL_S = 0.02


def main() -> None:
    """Run the process."""
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no event
    logging.getLogger("vlcache_fx").setLevel(logging.CRITICAL)  # it would log every fault
    torch.set_num_threads(1)
    lines = _lines(0)
    settings = StressSettings.from_json(next(line for line in iter(lines, "") if line is not None))
    fleet = Fleet(settings)
    fleet.warm_up()
    emit = _emitter(out)
    emit({"event": "ready"})
    ends, keeps = os.pipe()  # workers end when no process has ``keeps`` any more
    labels: dict[int, str] = {}
    is_open = True
    while is_open or labels:
        label = lines() if is_open else None
        if label == "":
            is_open = False
            os.close(keeps)
        elif label is not None:
            child = os.fork()
            if not child:
                os.close(keeps)
                os.close(0)
                _run(fleet, settings, label, ends, _emitter(out))
            labels[child] = label
        _reap(labels, emit)


def _run(fleet: Fleet, settings: StressSettings, label: str, ends: int, emit: Emit) -> None:
    """Work in a forked process until ``ends`` closes; never returns."""
    ended = threading.Event()

    def wait() -> None:
        os.read(ends, 1)
        ended.set()

    code = 1
    try:
        threading.Thread(target=wait, daemon=True).start()
        code = 0 if work(fleet, settings, label, ended, emit) else 3
    except Exception:  # noqa: BLE001 - it counts, whatever it is
        emit({"event": "failure", "error": f"worker {label}: {traceback.format_exc()[-LONGEST_TEXT:]}"})
    finally:
        sys.stderr.flush()
        os._exit(code)  # also if a request is stuck


def _reap(labels: dict[int, str], emit: Emit) -> None:
    child, status = os.waitpid(-1, os.WNOHANG) if labels else (0, 0)
    if child:
        emit({"event": "exit", "label": labels.pop(child), "code": os.waitstatus_to_exitcode(status)})


def _emitter(out: int) -> Emit:
    lock = threading.Lock()

    def emit(event: Event) -> None:
        with lock:
            os.write(out, (json.dumps(event) + "\n").encode())

    return emit


def _lines(handle: int) -> Callable[[], str | None]:
    """Return a function that returns the next line; None if there is none yet, "" at the end."""
    buffer = bytearray()

    def line() -> str | None:
        if b"\n" not in buffer:
            if not select.select([handle], [], [], POLL_S)[0]:
                return None
            data = os.read(handle, 1 << 16)
            if not data:
                return ""
            buffer.extend(data)
        if b"\n" not in buffer:
            return None
        found, _, rest = bytes(buffer).partition(b"\n")
        buffer[:] = rest
        return found.decode()

    return line


if __name__ == "__main__":
    main()
