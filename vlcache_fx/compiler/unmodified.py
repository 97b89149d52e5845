"""Traced graphs without reuse: for graphs that are not rewritten, and calls that a program does not cover."""

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
    """A traced graph without reuse: takes the inputs of the captured graph and returns its results."""

    def prepare(self, engine: Engine) -> Compiled:
        """Compile it now, as ``engine`` says, for a graph that is called without reuse."""

    def release(self) -> None:
        """Free what only ``prepare`` needs; it is not called any more."""

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Run it."""


class DynamoGraph:
    """The graph that Dynamo traced; ``prepare`` compiles it as plain ``torch.compile`` would."""

    def __init__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self._graph_module, self._example_inputs = graph_module, example_inputs
        # Until ``prepare``: a call that comes here was meant to be rewritten, and compiling the graph again
        # for it would not pay.
        self._run: Compiled = graph_module

    def prepare(self, engine: Engine) -> Compiled:
        """Compile now, while Dynamo's compilation context is there."""
        if engine.lowering.name == "inductor":
            self._run = self._compiled(engine)
        self.release()
        return self._run

    def _compiled(self, engine: Engine) -> Compiled:
        """By Inductor; or as it is, where that fails, which is not the caller's fault."""
        from torch._inductor.compile_fx import compile_fx

        # The compiler takes the graph apart, and might fail half-way.
        given = copy_module(self._graph_module)
        try:
            with compiling():
                compiled: Any = compile_fx(
                    given,
                    list(self._example_inputs),
                    config_patches=engine.options.inductor_config,
                )
        except (RestartAnalysis, SkipFrame):  # no failures: Dynamo is to look again, or not at all
            raise
        except Exception as error:  # noqa: BLE001 (torch raises many kinds here)
            missing = missing_tool(error)
            if missing is not None:
                engine.go_on_without_compiler(NoCompilerError(missing))
            else:
                text = str(error).strip().partition("\n")[0]
                detail = f"Inductor failed, eager kernels are used: {type(error).__name__}: {text}"
                engine.refuse(UnsupportedGraphError(Reason.LOWERING_FAILED, detail))
            return self._graph_module
        return cast(Compiled, compiled)

    def release(self) -> None:
        """Free the inputs of the first call, keys of a whole prompt among them."""
        self._example_inputs = ()

    def __call__(self, *args: Any) -> Sequence[Any]:
        return self._run(*args)


class Rewrapped:
    """A graph whose inputs are tensor subclasses, called with the plain tensors that they are made of."""

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
