"""Threads that call one model compile each of its graphs once.

Dynamo searches its cache before it waits for its lock, but not after: each thread that waits during a
compilation would compile the same graph again. A search may also miss an entry that another thread moves to
the front at the same time. Each copy costs a compilation and counts towards ``recompile_limit``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.exc import BackendCompilerFailed

from vlcache_fx.compiler.engine import Engine

__all__ = ["Turns"]

Result = TypeVar("Result")

TRANSPARENT = frozenset({"contextlib", "vlcache_fx.api", __name__})
"""Modules, in addition to torch's, whose functions may run twice in one call."""


MAX_ATTEMPTS = 4
"""Attempts per call, in case Dynamo never finds the compiled graph."""


class _CompiledAlreadyError(Exception):
    """Another thread has compiled a graph for this call."""


@dataclass
class _Call:
    """A call of the model in one thread.

    Attributes:
        graph_calls: number of graphs that the thread had called before the call.
        may_repeat: False in the last attempt.
    """

    graph_calls: int
    may_repeat: bool


class Turns:
    """Lets threads that call one model compile its graphs one after another.

    Args:
        engine: the model's engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._first = threading.RLock()
        self._has_begun = False
        self._thread = threading.local()

    def run(self, call: Callable[[], Result]) -> Result:
        """Return ``call()``, which calls the model; repeat it if another thread compiled its graph meanwhile.

        The first call runs alone: it compiles the graphs that later calls need.

        Raises:
            Exception: as raised by ``call``, errors of the backend included.
        """
        if self._has_begun:
            return self._run(call)
        with self._first:
            if not self._has_begun:
                try:
                    return self._run(call)
                finally:
                    self._has_begun = True
        return self._run(call)

    def _run(self, call: Callable[[], Result]) -> Result:
        before = getattr(self._thread, "call", None)
        attempt = 1
        try:
            while True:
                self._thread.call = _Call(self._engine.graph_calls, attempt < MAX_ATTEMPTS)
                try:
                    return call()
                except BackendCompilerFailed as failure:
                    if not isinstance(failure.inner_exception, _CompiledAlreadyError):
                        raise
                attempt += 1
        finally:
            self._thread.call = before

    def check(self) -> None:
        """Check that no other thread has compiled the graph; the backend calls this before it compiles.

        Raises:
            _CompiledAlreadyError: another thread has; ``run`` repeats the call.
        """
        call: _Call | None = getattr(self._thread, "call", None)
        if call is None or not call.may_repeat or self._engine.graph_calls != call.graph_calls:
            return
        # With ``suppress_errors``, Dynamo would leave the function uncompiled.
        if not torch._dynamo.config.suppress_errors and _nothing_else_ran() and _is_compiled():
            raise _CompiledAlreadyError


def _frames() -> Iterator[FrameType]:
    """Yield the frames of this thread, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _nothing_else_ran() -> bool:
    """Return True if no Python code of the model is running: Dynamo compiles the beginning of the call."""
    for frame in _frames():
        if frame.f_code is Turns._run.__code__:
            return True
        module = str(frame.f_globals.get("__name__"))
        if module not in TRANSPARENT and module.partition(".")[0] != "torch":
            return False
    return False


def _is_compiled() -> bool:
    """Return True if a compiled graph already fits the frame that Dynamo is compiling."""
    for frame in _frames():
        wanted = frame.f_locals.get("frame")
        if frame.f_globals.get("__name__") == "torch._dynamo.convert_frame" and wanted is not None:
            entries = _debug_get_cache_entry_list(wanted.f_code)
            return any(entry.guard_manager.check(dict(wanted.f_locals)) for entry in entries)
    return False
