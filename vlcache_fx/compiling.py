"""Compilation in processes with several threads, and the tools that a compiler lacks on this machine.

Torch traces and compiles with state of the whole process. Two traces at once corrupt each other, and during a
trace, calls of compiled functions in other threads fail because they seem to be traced as well.
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

__all__ = [
    "compiling",
    "dynamo_settings",
    "missing_tool",
    "no_compilation",
    "raise_graph_limit",
    "with_globals",
]

FLAG = "_is_fx_tracing_flag"
"""A global of torch's tracer that is true for all threads while any thread traces."""


@contextmanager
def compiling() -> Iterator[None]:
    """Capture, rewrite, lower and compile in the body, one thread at a time.

    The lock is that of torch's compiler, so there is no lock order to violate. It is reentrant. Calls of
    compiled functions do not wait for it.
    """
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock, _private_traces():
        yield


def no_compilation() -> AbstractContextManager[Any]:
    """Let no other thread compile in the body.

    For eager code that asks ``torch.compiler.is_compiling()``, as encoders of transformers do: while one
    thread compiles, the answer is True in all threads, and they take branches that are not safe in threads.
    """
    from torch._dynamo.convert_frame import compile_lock

    return cast(AbstractContextManager[Any], compile_lock)


@contextmanager
def _private_traces() -> Iterator[None]:
    """Hide traces in the body from other threads. The caller has the lock."""
    import torch._dynamo
    from torch import fx

    shared = fx.Tracer.trace  # wrapped by Dynamo after its first use
    original = inspect.unwrap(shared)
    if not isinstance(original, FunctionType) or FLAG not in original.__globals__:
        yield  # nested, or a version of torch with another tracer
        return
    private = _private(original)
    wrapped = private if shared is original else torch._dynamo.disable(private)  # type: ignore[no-untyped-call]
    fx.Tracer.trace = wrapped  # type: ignore[method-assign]
    try:
        yield
    finally:
        fx.Tracer.trace = shared  # type: ignore[method-assign]


def _private(trace: FunctionType) -> Any:
    """Return ``fx.Tracer.trace`` with a private flag.

    ``trace`` also patches ``nn.Module.__call__`` and ``__getattr__`` for all threads. ``make_fx`` traces at
    the dispatcher and needs no patches, so its traces get none.
    """
    from torch.fx.experimental.proxy_tensor import PythonKeyTracer

    patching = with_globals(trace, {})
    unpatched = with_globals(trace, {"_new_patcher": _no_patches})

    def private(self: Any, root: Any, concrete_args: Any = None) -> Any:
        return (unpatched if type(self) is PythonKeyTracer else patching)(self, root, concrete_args)

    return private


def with_globals(function: FunctionType, changes: dict[str, Any]) -> FunctionType:
    """Return a copy of ``function`` with its own globals, changed by ``changes``."""
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
    """Stand-in for the patcher of ``torch.fx`` that patches nothing."""

    def patch(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def patch_method(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def visit_once(self, _: Any) -> bool:
        """Return False: no module needs a visit."""
        return False


@contextmanager
def _no_patches() -> Iterator[_NoPatches]:
    yield _NoPatches()


def dynamo_settings(changes: Mapping[str, Any]) -> AbstractContextManager[Any]:
    """Return a context manager that changes settings of Dynamo; threads may enter and leave in any order.

    Args:
        changes: settings by name, the same in every call. Names unknown to this version of torch are skipped.
    """
    config: Any = import_module("torch._dynamo.config")
    known = {name: value for name, value in changes.items() if name in config._config}

    def patch() -> AbstractContextManager[Any]:
        return cast(AbstractContextManager[Any], config.patch(known))

    override = next(iter(config._config.values())).user_override
    # Settings are per thread after torch 2.11.
    return patch() if isinstance(override, ContextVar) else _shared_settings(patch)


class SharedSettings:
    """Settings of the whole process: the first thread to enter sets them, the last to leave restores them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bodies = 0
        self._patch: AbstractContextManager[Any] = nullcontext()

    @contextmanager
    def __call__(self, patch: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Apply ``patch()`` in the body."""
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


_shared_settings = SharedSettings()  # per process, like torch's settings


def raise_graph_limit(limit: int) -> None:
    """Raise the limit of graphs of the function that Dynamo is compiling, for all threads.

    For backends. Threads that wait for a compilation compile the graph again, and every copy counts, so eight
    threads exhaust Dynamo's default of 8. Dynamo's setting is per thread; this function changes the attribute
    that ``torch.compile(recompile_limit=...)`` sets, unless the user set it. Without effect in versions of
    torch that lack this argument.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch._dynamo.convert_frame":
            owner = frame.f_locals.get("self")
            if getattr(owner, "_recompile_limit", limit) is None:
                owner._recompile_limit = limit  # type: ignore[union-attr]
        frame = frame.f_back


def missing_tool(error: BaseException) -> str | None:
    """Name the tool that torch's compiler does not find on this machine, and the remedy, in one line.

    Args:
        error: the compiler's error, or an error that wraps it.

    Returns:
        None for failures of another kind.
    """
    from torch._inductor import exc

    cxx = 'install one, such as g++, or use lowering="eager"'
    texts = {
        "InvalidCxxCompiler": f"no C++ compiler was found: {cxx}",
        "TritonMissing": 'no working Triton was found: install it, or use lowering="eager"',
        "GPUTooOldForTriton": 'this GPU is too old for Triton: use lowering="eager"',
    }
    known = {getattr(exc, name, None): text for name, text in texts.items()}
    for cause in _causes(error):
        found = known.get(type(cause))
        if found is None and isinstance(cause, PermissionError):
            found = f"no permission to run the C++ compiler {cause.filename}: {cxx}"
        if found is not None:
            return found
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and all errors that it wraps."""
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo:
        cause = todo.pop()
        if isinstance(cause, BaseException) and id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            todo += [cause.__cause__, cause.__context__, getattr(cause, "inner_exception", None)]
