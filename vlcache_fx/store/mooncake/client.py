"""Calls of Mooncake's client with deadlines: the client runs in a child process (``worker``)."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, TypeAlias

from vlcache_fx.errors import StoreError
from vlcache_fx.store.mooncake.arena import Arena
from vlcache_fx.store.mooncake.settings import MooncakeSettings

START_S = 10.0
"""How long a client may take to start; at run time this happens in the background."""

LOCAL_BUFFER_BYTES = 16 << 20
"""What Mooncake allocates for copies that it makes itself; none are made here."""

INSTALL = (
    "pip install 'vlcache_fx[mooncake]', or 'vlcache_fx[mooncake-cpu]' on a machine without CUDA, "
    "and the Debian packages libibverbs1 librdmacm1 libnuma1 libcurl4"
)

# Mooncake's error codes (mooncake-store/include/types.h).
NO_ROOM = frozenset({-200, -1700})
"""No space, or none for this tenant."""

LEASE_EXPIRED = -707

ABSENT = frozenset({-702, -703, -704, LEASE_EXPIRED, -712})
"""Not there, not whole yet, or evicted while it was read."""

TAKEN = frozenset({-703, -705, -714})
"""Another client puts the same name, or has put it."""

BUFFER_TOO_SMALL = -600

Answers: TypeAlias = "queue.SimpleQueue[dict[str, Any] | None]"


class MooncakeClient:
    """A child process that is connected to a master, and the memory shared with it.

    A client with a call that failed to answer in time is not used again, nor is its memory: the transfer may
    still write to it.

    Args:
        settings: how to reach the master.

    Raises:
        StoreError: the master cannot be reached, or Mooncake is not installed.
    """

    def __init__(self, settings: MooncakeSettings) -> None:
        _check_package()
        local = _check_master(settings)
        self.arena = Arena(settings.buffer_bytes)
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._answers: dict[int, Answers] = {}
        self._ended = False
        self._process, self._connection = _spawn(self.arena.fd)
        reader = threading.Thread(target=self._read, name="vlcache-mooncake", daemon=True)
        reader.start()
        setup = {
            "local": local,
            "metadata": settings.metadata,
            "local_buffer_bytes": LOCAL_BUFFER_BYTES,
            "protocol": settings.protocol,
            "device": settings.device,
            "master": settings.address,
        }
        try:
            self.call("setup", START_S, setup=setup, fd=self.arena.fd, nbytes=self.arena.nbytes)
        except StoreError as error:
            self.close()
            hint = f"; is it installed? {INSTALL}" if "ImportError" in str(error) else ""
            raise StoreError(f"cannot connect to Mooncake at {settings.address}: {error}{hint}") from error

    def call(self, operation: str, timeout_s: float, **arguments: Any) -> list[int]:
        """Return the codes of a call.

        Raises:
            StoreError: no answer within ``timeout_s`` seconds, or Mooncake failed.
        """
        return next(self.stream(operation, time.monotonic() + timeout_s, 1, **arguments))

    def stream(self, operation: str, deadline: float, count: int, **arguments: Any) -> Iterator[list[int]]:
        """Send a request now, and yield the codes of its ``count`` answers as they come.

        Args:
            operation: see ``worker.Worker.answers``.
            deadline: of the last answer, by ``time.monotonic``.
            count: number of answers.
            arguments: of the operation, JSON data.

        Raises:
            StoreError: as ``call``.
        """
        answers: Answers = queue.SimpleQueue()
        request = next(self._ids)
        with self._lock:
            if self._ended:
                raise StoreError("Mooncake's client has ended")
            self._answers[request] = answers
            try:
                message = {"id": request, "op": operation, **arguments}
                self._connection.send_bytes(json.dumps(message).encode())
            except OSError as error:
                del self._answers[request]
                raise StoreError(f"Mooncake's client has ended: {error}") from error
        return self._receive(request, operation, answers, deadline, count)

    def failure(self, reason: str) -> StoreError:
        """Return an error after which this client and its memory are not used again."""
        self.arena.seal()
        return StoreError(reason)

    def close(self) -> None:
        """End the child process, at once."""
        with self._lock:
            self._ended = True
        # Killed: signing off may hang, and the master forgets clients that are silent.
        self._process.kill()
        self._process.wait()
        self.arena.close()

    def _receive(
        self, request: int, operation: str, answers: Answers, deadline: float, count: int
    ) -> Iterator[list[int]]:
        try:
            for _ in range(count):
                try:
                    answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    raise self.failure(f"Mooncake did not answer in time ({operation})") from None
                if answer is None:
                    raise self.failure(f"Mooncake's client has ended ({operation})")
                if "error" in answer:
                    raise self.failure(f"{operation}: {answer['error']}")
                yield answer["codes"]
        finally:
            with self._lock:
                self._answers.pop(request, None)

    def _read(self) -> None:
        """Hand out answers until the child process ends."""
        with contextlib.suppress(EOFError, OSError), self._connection:
            while True:
                answer = json.loads(self._connection.recv_bytes())
                with self._lock:
                    answers = self._answers.get(answer["id"])
                if answers is not None:
                    answers.put(answer)
        with self._lock:
            self._ended = True
            waiting = list(self._answers.values())
        for answers in waiting:
            answers.put(None)


def _spawn(arena_fd: int) -> tuple[subprocess.Popen[bytes], Connection[Any, Any]]:
    ours, theirs = Pipe()
    with theirs:
        worker = Path(__file__).with_name("worker.py")
        # -P: the folder of the script holds modules of ours, which nothing there should import by chance.
        process = subprocess.Popen(  # noqa: S603 - nothing in it comes from outside
            [sys.executable, "-P", str(worker), str(theirs.fileno())],
            pass_fds=[theirs.fileno(), arena_fd],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,  # Ctrl-C is for the parent, which ends it
        )
    return process, ours


def _check_package() -> None:
    if importlib.util.find_spec("mooncake") is None:
        raise StoreError(f"mooncake:// needs Mooncake, which is not installed: {INSTALL}")


def _check_master(settings: MooncakeSettings) -> str:
    """Return this machine's address; Mooncake itself would try for long, and not say why it failed."""
    try:
        with socket.create_connection((settings.host.strip("[]"), settings.port), settings.timeout_ms / 1000):
            return settings.local_address()
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(f"nothing answers at mooncake://{settings.address}: {reason}") from error


def failed(codes: Sequence[int]) -> bool:
    """Return whether any code is an error."""
    return any(code < 0 for code in codes)
