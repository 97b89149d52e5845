"""Traced graphs without reuse: for graphs that are not rewritten, and calls that programs do not serve."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from torch import fx
from torch._dynamo.exc import RestartAnalysis, SkipFrame

from vlcache_fx.capture.wrapped import Unwrapped
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiling import compiling, missing_tool
from vlcache_fx.errors import NoCompilerError, Reason, UnsupportedGraphError
from vlcache_fx.ir.copies import copy_module

Compiled = Callable[..., Sequence[Any]]
"""Takes the inputs of a graph and returns its results."""


class Unmodified(Protocol):
    """A traced graph without reuse: takes the captured graph's inputs, returns its results."""

    def prepare(self, engine: Engine) -> Compiled:
        """Compile the graph with the engine's lowering, to be called without reuse."""

    def release(self) -> None:
        """Free data that only ``prepare`` needs; it must not be called again."""

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Run the graph."""


class DynamoGraph:
    """The graph that Dynamo traced; ``prepare`` compiles it as plain ``torch.compile`` would."""

    def __init__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self._graph_module, self._example_inputs = graph_module, example_inputs
        # Uncompiled until ``prepare``: rare fallback calls of a rewritten graph do not pay for a compilation.
        self._run: Compiled = graph_module

    def prepare(self, engine: Engine) -> Compiled:
        """Compile the graph, within Dynamo's compilation context."""
        if engine.lowering.name == "inductor":
            self._run = self._compiled(engine)
        self.release()
        return self._run

    def _compiled(self, engine: Engine) -> Compiled:
        """Return the graph compiled by Inductor, or uncompiled if Inductor fails."""
        from torch._inductor.compile_fx import compile_fx

        # Inductor modifies the graph, and may fail half-way.
        copied = copy_module(self._graph_module)
        try:
            with compiling(), engine.logging_compilation("graph without reuse"):
                compiled: Any = compile_fx(
                    copied,
                    list(self._example_inputs),
                    config_patches=engine.options.inductor_config,
                )
        except (RestartAnalysis, SkipFrame):  # not failures: they tell Dynamo to trace again, or to skip
            raise
        except Exception as error:  # noqa: BLE001 (torch raises many kinds here)
            missing = missing_tool(error)
            if missing is not None:
                engine.continue_without_compiler(NoCompilerError(missing))
            else:
                text = str(error).strip().partition("\n")[0]
                detail = f"Inductor failed, using eager kernels: {type(error).__name__}: {text}"
                engine.refuse(UnsupportedGraphError(Reason.LOWERING_FAILED, detail))
            return self._graph_module
        return cast(Compiled, compiled)

    def release(self) -> None:
        """Free the inputs of the first call, which may include a whole KV cache."""
        self._example_inputs = ()

    def __call__(self, *args: Any) -> Sequence[Any]:
        return self._run(*args)


class Rewrapped:
    """A graph with tensor subclasses as inputs, called with their inner tensors."""

    def __init__(self, unmodified: Unmodified, unwrapped: Unwrapped) -> None:
        self._unmodified, self._unwrapped = unmodified, unwrapped

    def prepare(self, engine: Engine) -> Compiled:
        """See ``Unmodified``."""
        self._unmodified.prepare(engine)
        return self

    def release(self) -> None:
        """See ``Unmodified``."""
        self._unmodified.release()

    def __call__(self, *args: Any) -> Sequence[Any]:
        return self._unmodified(*self._unwrapped.whole(args))
