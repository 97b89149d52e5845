"""Threads that call one model compile each of its graphs once.

Dynamo searches its cache before it waits for its lock, and not again afterwards: each thread that waits while
a graph is compiled would compile the same graph again. And while one thread searches, others move the entry
that they found to the front, so the search may miss an entry. Every copy costs a compilation, and counts
towards ``recompile_limit``.
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
"""Per call, so that it ends even if Dynamo never takes the graph that was compiled."""


class _CompiledAlreadyError(Exception):
    """Another thread has compiled a graph for this call."""


@dataclass
class _Call:
    """A call that a thread makes.

    Attributes:
        ran: calls of graphs that this thread had made before the call.
        may_begin_again: False in the last attempt.
    """

    ran: int
    may_begin_again: bool


class Turns:
    """The order in which threads that call one model compile its graphs.

    Args:
        engine: of the model.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._first = threading.RLock()
        self._has_begun = False
        self._thread = threading.local()

    def run(self, call: Callable[[], Result]) -> Result:
        """Return ``call()``, which calls the model; repeat it if another thread compiled its graph meanwhile.

        The first call of all runs alone: it compiles the graphs that all others need.

        Raises:
            Exception: what ``call`` raises; what the backend raised, as it was.
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
        """Called by the backend before it compiles a graph.

        Raises:
            _CompiledAlreadyError: for ``run``, which begins the call again.
        """
        call: _Call | None = getattr(self._thread, "call", None)
        if call is None or not call.may_begin_again or self._engine.graph_calls != call.ran:
            return
        # Torch would take the error for a reason to leave the function uncompiled.
        if not torch._dynamo.config.suppress_errors and _nothing_else_ran() and _is_compiled():
            raise _CompiledAlreadyError


def _frames() -> Iterator[FrameType]:
    """The frames of this thread, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _nothing_else_ran() -> bool:
    """True if Dynamo compiles at the beginning of the call: no Python code of the model is running."""
    for frame in _frames():
        if frame.f_code is Turns._run.__code__:
            return True
        module = str(frame.f_globals.get("__name__"))
        if module not in TRANSPARENT and module.partition(".")[0] != "torch":
            return False
    return False


def _is_compiled() -> bool:
    """True if an earlier compiled graph serves the frame that Dynamo is compiling."""
    for frame in _frames():
        wanted = frame.f_locals.get("frame")
        if frame.f_globals.get("__name__") == "torch._dynamo.convert_frame" and wanted is not None:
            entries = _debug_get_cache_entry_list(wanted.f_code)
            return any(entry.guard_manager.check(dict(wanted.f_locals)) for entry in entries)
    return False
