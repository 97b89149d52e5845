"""One compilation at a time in a process, unseen by threads that compile nothing; and what compilers lack.

Torch traces and compiles with state of the whole process: two traces at once spoil each other, and while one
goes on, whatever calls a compiled function in another thread is told that it is being traced itself.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from importlib import import_module
from types import FrameType, FunctionType
from typing import Any, cast

__all__ = ["compiling", "dynamo_settings", "missing_tool", "raise_graph_limit"]

FLAG = "_is_fx_tracing_flag"
"""A global of torch's tracer that says to all threads that something is traced."""


@contextmanager
def compiling() -> Iterator[None]:
    """Capture, rewrite, lower and compile in the body: no other thread does meanwhile.

    The lock is that of torch's own compiler, so that no two locks can cross; a thread may take it again.
    Threads that call what is compiled do not wait for it.
    """
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock, _private_traces():
        yield


@contextmanager
def _private_traces() -> Iterator[None]:
    """Traces in the body leave no mark on the rest of the process. The lock is held."""
    import torch._dynamo
    from torch import fx

    shared = fx.Tracer.trace  # Dynamo, once used, has wrapped it
    original = inspect.unwrap(shared)
    if not isinstance(original, FunctionType) or FLAG not in original.__globals__:
        yield  # in a body of this kind, or in a torch that traces in another way
        return
    private = _private(original)
    wrapped = private if shared is original else torch._dynamo.disable(private)  # type: ignore[no-untyped-call]
    fx.Tracer.trace = wrapped  # type: ignore[method-assign]
    try:
        yield
    finally:
        fx.Tracer.trace = shared  # type: ignore[method-assign]


def _private(trace: FunctionType) -> Any:
    """``fx.Tracer.trace`` that sets its flag where no other thread looks.

    It also replaces the methods by which modules are called, for all threads. ``make_fx`` has no use for
    that (it traces what reaches the dispatcher), so its traces go without.
    """
    from torch.fx.experimental.proxy_tensor import PythonKeyTracer

    unseen = _with_globals(trace, {})
    alone = _with_globals(trace, {"_new_patcher": _no_patches})

    def private(self: Any, root: Any, concrete_args: Any = None) -> Any:
        return (alone if type(self) is PythonKeyTracer else unseen)(self, root, concrete_args)

    return private


def _with_globals(function: FunctionType, changes: dict[str, Any]) -> FunctionType:
    """The same function, with globals of its own."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **changes},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class _NoPatches:
    """What ``fx`` patches with, for traces that need nothing patched."""

    def patch(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def patch_method(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def visit_once(self, _: Any) -> bool:
        """Nothing is to be looked at."""
        return False


@contextmanager
def _no_patches() -> Iterator[_NoPatches]:
    yield _NoPatches()


def dynamo_settings(changes: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Settings of Dynamo for the body, whichever threads enter and leave it in whatever order.

    Args:
        changes: settings by name; the same ones in every call. Those that this version of torch has not are
            left out.
    """
    config: Any = import_module("torch._dynamo.config")

    known = {name: value for name, value in changes.items() if name in config._config}

    def patch() -> AbstractContextManager[Any]:
        return cast(AbstractContextManager[Any], config.patch(known))

    one = next(iter(config._config.values())).user_override
    # Each thread has its own in later versions than torch 2.11.
    return patch() if isinstance(one, ContextVar) else _shared_settings(patch)


class SharedSettings:
    """Settings of the whole process: who comes first sets them, who leaves last restores them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bodies = 0
        self._patch: AbstractContextManager[Any] = nullcontext()

    @contextmanager
    def __call__(self, patch: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """``patch()`` is in force in the body."""
        with self._lock:
            if self._bodies == 0:
                self._patch = patch()
                self._patch.__enter__()
            self._bodies += 1
        try:
            yield
        finally:
            with self._lock:
                self._bodies -= 1
                if self._bodies == 0:
                    self._patch.__exit__(None, None, None)


_shared_settings = SharedSettings()  # torch's settings are of the process, and so is who uses them


def raise_graph_limit(limit: int) -> None:
    """Let the function that Dynamo is compiling have ``limit`` graphs, whichever threads call it.

    Called by a backend. Threads that wait while a graph is compiled compile it again, each for itself, and
    every copy counts: by Dynamo's own limit of 8, eight threads that begin together would be the end of it.
    Its setting holds for one thread alone, so the limit goes where ``torch.compile(recompile_limit=...)``
    puts it; one that was given there stays. Does nothing in versions of torch without that argument.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch._dynamo.convert_frame":
            owner = frame.f_locals.get("self")
            if getattr(owner, "_recompile_limit", limit) is None:
                owner._recompile_limit = limit  # type: ignore[union-attr]
        frame = frame.f_back


def missing_tool(error: BaseException) -> str | None:
    """What torch's compiler needs and does not find on this machine, and the remedy, in one line.

    Args:
        error: as the compiler raised it, or wrapped any number of times.

    Returns:
        None where the failure is of another kind.
    """
    from torch._inductor import exc

    cxx = 'install one, such as g++, or use lowering="eager"'
    texts = {
        "InvalidCxxCompiler": f"no C++ compiler was found: {cxx}",
        "TritonMissing": 'no working Triton was found: install it, or use lowering="eager"',
        "GPUTooOldForTriton": 'this GPU is too old for Triton: use lowering="eager"',
    }
    known = {getattr(exc, name, None): text for name, text in texts.items()}
    for one in _wrapped_in(error):
        found = known.get(type(one))
        if found is None and isinstance(one, PermissionError):
            found = f"the C++ compiler {one.filename} may not be run: {cxx}"
        if found is not None:
            return found
    return None


def _wrapped_in(error: BaseException) -> Iterator[BaseException]:
    """The error, and all that it was raised from."""
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo:
        one = todo.pop()
        if isinstance(one, BaseException) and id(one) not in seen:
            seen.add(id(one))
            yield one
            todo += [one.__cause__, one.__context__, getattr(one, "inner_exception", None)]
