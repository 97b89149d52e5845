"""Compilation with several threads, and the tools that a compiler lacks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import fx, nn
from torch._inductor import exc
from torch.fx.experimental.proxy_tensor import make_fx

from vlcache_fx.compiling import (
    SharedSettings,
    compiling,
    dynamo_settings,
    missing_tool,
    raise_graph_limit,
)

from .runtime.helpers import own_compiler_state

Result = TypeVar("Result")


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield


def elsewhere(function: Callable[[], Result]) -> Result:
    """Return the result of ``function`` in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


# Traces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_compiling_other_threads_call_compiled_functions(pre_dispatch: bool) -> None:
    compiled = torch.compile(lambda x: x.sin() + 1, backend="eager")
    expected = compiled(torch.ones(3))
    seen = []

    def traced(x: torch.Tensor) -> torch.Tensor:
        seen.append(elsewhere(lambda: compiled(torch.ones(3))))
        return x * 2

    with compiling():
        graph = make_fx(traced, pre_dispatch=pre_dispatch)(torch.ones(2))
    assert torch.equal(seen[0], expected)
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)) == 1


def test_compiling_other_threads_call_modules() -> None:
    methods = (nn.Module.__call__, nn.Module.__getattr__)
    seen = []

    def traced(x: torch.Tensor) -> torch.Tensor:
        seen.append((nn.Module.__call__, nn.Module.__getattr__))
        return x * 2

    with compiling():
        make_fx(traced)(torch.ones(2))
    assert seen == [methods]


def test_compiling_other_tracers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * 2

    with compiling():
        graph = fx.symbolic_trace(Twice()).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "call_function", "output"]


def test_compiling_restores_torch() -> None:
    before = fx.Tracer.trace
    with compiling():
        with compiling():
            pass
        inside = fx.Tracer.trace
    with contextlib.suppress(ValueError), compiling():
        raise ValueError
    assert inside is not before
    assert fx.Tracer.trace is before


def test_compiling_one_thread_at_a_time() -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def compile_something(_: int) -> None:
        nonlocal inside, most
        with compiling():
            with lock:
                inside += 1
                most = max(most, inside)
            make_fx(torch.sin)(torch.ones(2))
            with lock:
                inside -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(compile_something, range(12)))
    assert most == 1


# Settings ---------------------------------------------------------------------------------------------------


def test_dynamo_settings_hold_in_the_body() -> None:
    config = torch._dynamo.config
    before = config.capture_scalar_outputs
    with dynamo_settings({"capture_scalar_outputs": not before}):
        assert config.capture_scalar_outputs is not before
    assert config.capture_scalar_outputs is before


def test_shared_settings_end_with_the_last_body() -> None:
    setting = "default"

    @contextlib.contextmanager
    def patch() -> Iterator[None]:
        nonlocal setting
        before, setting = setting, "ours"
        yield
        setting = before

    shared = SharedSettings()
    first, second = shared(patch), shared(patch)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # not nested: these are two threads
    assert setting == "ours"
    second.__exit__(None, None, None)
    assert setting == "default"


def graphs_of_forms(limit: int | None, **options: Any) -> int:
    """Return the number of graphs of a function that is called in twelve forms."""
    graphs = []

    def backend(graph_module: fx.GraphModule, _: Any) -> Any:
        if limit is not None:
            raise_graph_limit(limit)
        graphs.append(graph_module)
        return graph_module.forward

    def scaled(x: torch.Tensor, factor: int) -> torch.Tensor:
        return x * factor

    torch._dynamo.reset()
    compiled = torch.compile(scaled, backend=backend, dynamic=False, **options)
    with torch._dynamo.config.patch(recompile_limit=8):
        for factor in range(2, 14):
            assert compiled(torch.ones(2), factor).tolist() == [factor, factor]
    return len(graphs)


@pytest.mark.skipif(
    not hasattr(torch._dynamo.convert_frame.ConvertFrameAssert(None), "_recompile_limit"),  # type: ignore[arg-type]
    reason="this version of torch has no limit per function",
)
def test_raise_graph_limit_in_backend() -> None:
    assert graphs_of_forms(None) == 8
    assert graphs_of_forms(64) == 12
    assert graphs_of_forms(64, recompile_limit=10) == 10  # the user's limit stays


# Compilers --------------------------------------------------------------------------------------------------


def wrapped(error: Exception) -> Exception:
    """Return the error as Inductor raises it, and as its callers wrap it."""
    outer = RuntimeError("a segment failed")
    outer.__cause__ = exc.InductorError(error, None)
    return outer


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            exc.InvalidCxxCompiler(),
            'no C++ compiler was found: install one, such as g++, or use lowering="eager"',
        ),
        (exc.TritonMissing(None), "no working Triton was found: install it"),
        (
            PermissionError(13, "Permission denied", "/opt/g++"),
            "no permission to run the C++ compiler /opt/g++",
        ),
    ],
)
def test_missing_tool_message(error: Exception, text: str) -> None:
    for raised in (error, wrapped(error)):
        found = missing_tool(raised)
        assert found is not None
        assert found.startswith(text)
        assert 'lowering="eager"' in found
        assert "\n" not in found


def test_missing_tool_other_failures() -> None:
    assert missing_tool(wrapped(RuntimeError("no C++ compiler"))) is None
    assert missing_tool(exc.CppCompileError(["g++"], "error: expected ;")) is None
