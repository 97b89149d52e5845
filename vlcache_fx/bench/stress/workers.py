"""Worker processes, as the parent of a stress run sees them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from typing import IO, Any

from vlcache_fx.bench.rounds import MeasurementError
from vlcache_fx.bench.stress.settings import StressSettings

START_S = 600.0
"""Seconds in which the models must be compiled."""

Events = queue.SimpleQueue[dict[str, Any]]


class Workers:
    """Starts, kills and ends worker processes, which are forked from one that has compiled the models.

    Args:
        settings: of the run.
        events: receives the workers' events.

    Attributes:
        killed: labels of the workers that were killed.

    Raises:
        MeasurementError: the models cannot be compiled.
    """

    def __init__(self, settings: StressSettings, events: Events) -> None:
        self._events, self._ready, self.killed = events, threading.Event(), set[str]()
        self._lock, self._pids = threading.Lock(), dict[str, int]()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._forker = subprocess.Popen(
            [sys.executable, "-m", "vlcache_fx.bench.stress.forker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._write(settings.as_json())
        if not self._ready.wait(START_S) or self._forker.poll() is not None:
            errors = self._tail()
            self.close(0.0)
            raise MeasurementError(f"the models of the stress run do not compile: {errors}")

    @property
    def labels(self) -> list[str]:
        """Labels of the living workers that have begun."""
        with self._lock:
            return sorted(self._pids)

    def start(self, label: str) -> None:
        """Start a worker."""
        self._write(label)

    def kill(self, label: str) -> None:
        """Kill a worker without warning."""
        with self._lock:
            self.killed.add(label)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pids.pop(label), signal.SIGKILL)

    def close(self, timeout_s: float) -> str:
        """End all workers; return what went wrong, or nothing."""
        problem = ""
        assert self._forker.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._forker.stdin.close()
        try:
            if self._forker.wait(timeout_s):
                problem = f"the process that starts workers failed: {self._tail()}"
        except subprocess.TimeoutExpired:
            problem = f"workers {', '.join(self.labels)} did not end"
            for label in self.labels:
                self.kill(label)
            self._forker.kill()
            self._forker.wait()
        self._reader.join()
        assert self._forker.stdout is not None
        self._forker.stdout.close()
        self._errors.close()
        return problem

    def _write(self, line: str) -> None:
        assert self._forker.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # close() says why
            self._forker.stdin.write(line.encode() + b"\n")
            self._forker.stdin.flush()

    def _read(self) -> None:
        assert self._forker.stdout is not None
        for line in self._forker.stdout:
            try:
                event = json.loads(line)
            except ValueError:  # a killed process wrote half a line
                continue
            if event["event"] == "ready":
                self._ready.set()
            elif event["event"] == "start":
                with self._lock:
                    self._pids[event["label"]] = event["pid"]
            elif event["event"] == "exit":
                self._note_exit(event["label"], event["code"])
            else:
                self._events.put(event)
        self._ready.set()

    def _note_exit(self, label: str, code: int) -> None:
        with self._lock:
            self._pids.pop(label, None)
            was_killed = label in self.killed
        if code and not was_killed:
            text = f"worker {label} ended with code {code}: {self._tail()}"
            self._events.put({"event": "failure", "error": text})

    def _tail(self) -> str:
        size = os.fstat(self._errors.fileno()).st_size
        return os.pread(self._errors.fileno(), 2000, max(0, size - 2000)).decode(errors="replace")
