"""Threads that call one model compile each of its graphs once.

Dynamo looks for a compiled graph before it waits for its lock, and not again behind it: of threads that wait
while a graph is compiled, each would compile the same one, and every copy counts towards the limit at which
Dynamo gives a function up.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
from torch._dynamo.exc import BackendCompilerFailed

from vlcache_fx.runtime.engine import Engine

__all__ = ["Turns"]

Result = TypeVar("Result")

TRANSPARENT = frozenset({"contextlib", "vlcache_fx.api", __name__})
"""Modules, beside torch's, whose functions do nothing that must not be done twice."""


class _CompiledMeanwhileError(Exception):
    """Another thread compiled a graph of this model since the call began; it may serve the call."""


@dataclass
class _Call:
    """A call that a thread makes.

    Attributes:
        compiled: graphs of the model that were compiled when it began, and by itself since.
        ran: calls of graphs that this thread had made when it began.
        is_whole: nothing of it has run yet.
    """

    compiled: int
    ran: int
    is_whole: bool = True


class Turns:
    """Who compiles which graph of one model, where several threads call it.

    Args:
        engine: of the model.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._compiled = 0  # changed under the compiler's lock alone
        self._first = threading.RLock()
        self._has_begun = False
        self._thread = threading.local()

    def run(self, call: Callable[[], Result]) -> Result:
        """``call()``, which calls the model; from its beginning again where another thread compiled what it
        needs.

        The first call of all is made alone: it compiles, and all others would need what it compiles.

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
        try:
            while True:
                self._thread.call = _Call(self._compiled, self._engine.graph_calls)
                try:
                    return call()
                except BackendCompilerFailed as failure:
                    if not isinstance(failure.inner_exception, _CompiledMeanwhileError):
                        raise
        finally:
            self._thread.call = before

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Around the compilation of each graph, in the backend.

        Raises:
            _CompiledMeanwhileError: for ``run``, which begins the call again.
        """
        call: _Call | None = getattr(self._thread, "call", None)
        if call is not None and call.is_whole and call.compiled != self._compiled and self._may_begin_again():
            raise _CompiledMeanwhileError
        yield
        self._compiled += 1
        if call is not None:
            call.compiled, call.is_whole = self._compiled, False

    def _may_begin_again(self) -> bool:
        """True where nothing of this thread's call has run: no graph, and none of the model's own Python."""
        if self._engine.graph_calls != self._thread.call.ran or torch._dynamo.config.suppress_errors:
            return False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not Turns._run.__code__:
            module: Any = frame.f_globals.get("__name__")
            if module not in TRANSPARENT and str(module).partition(".")[0] != "torch":
                return False
            frame = frame.f_back
        return frame is not None
