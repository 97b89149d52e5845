"""What was captured, as it was: for whatever cannot be rewritten."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from torch import fx
from torch._dynamo.exc import RestartAnalysis, SkipFrame

from vlcache_fx.capture.decode_steps import is_decoding_step
from vlcache_fx.capture.dynamo import copy_graph
from vlcache_fx.capture.wrapped import Unwrapped
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiling import compiling, what_is_missing
from vlcache_fx.errors import NoCompilerError, Reason, UnsupportedGraphError

Compiled = Callable[..., Sequence[Any]]
"""Takes the inputs of a graph and returns its results."""


class Unmodified(Protocol):
    """What was captured, as it was: takes the inputs of the captured graph and returns its results."""

    def prepare(self) -> Compiled:
        """Whatever must be done before the first call, done now."""

    def release(self) -> None:
        """Let go of what only ``prepare`` needs, which will not be called any more."""

    def is_decoding_step(self) -> bool:
        """True for a step that continues a prompt: it has nothing to reuse."""

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Run it."""


class DynamoGraph:
    """The graph as Dynamo gave it, compiled as ``torch.compile`` would, when first needed."""

    def __init__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], engine: Engine) -> None:
        self._graph_module, self._example_inputs, self._engine = graph_module, example_inputs, engine
        # Until ``prepare``: a call that comes here was meant to be rewritten, and compiling the graph again
        # for it would not pay.
        self._run: Compiled = graph_module

    def is_decoding_step(self) -> bool:
        """See ``Unmodified``."""
        return is_decoding_step(self._graph_module.graph)

    def prepare(self) -> Compiled:
        """Compile now, while Dynamo's compilation context is there."""
        if self._engine.lowering.name == "inductor":
            self._run = self._compiled()
        self.release()
        return self._run

    def _compiled(self) -> Compiled:
        """By Inductor; or as it is, where that fails, which is not the caller's fault."""
        from torch._inductor.compile_fx import compile_fx

        # The compiler takes the graph apart, and might fail half-way.
        given = fx.GraphModule(self._graph_module, copy_graph(self._graph_module.graph))
        try:
            with compiling():
                compiled: Any = compile_fx(
                    given,
                    list(self._example_inputs),
                    config_patches=self._engine.options.inductor_config,
                )
        except (RestartAnalysis, SkipFrame):  # no failures: Dynamo is to look again, or not at all
            raise
        except Exception as error:  # noqa: BLE001 (torch raises many kinds here)
            missing = what_is_missing(error)
            if missing is not None:
                self._engine.go_on_without_compiler(NoCompilerError(missing))
            else:
                text = str(error).strip().partition("\n")[0]
                detail = f"Inductor failed, eager kernels are used: {type(error).__name__}: {text}"
                self._engine.refuse(UnsupportedGraphError(Reason.LOWERING_FAILED, detail))
            return self._graph_module
        return cast(Compiled, compiled)

    def release(self) -> None:
        """See ``Unmodified``: the inputs of the first call, keys of a whole prompt among them."""
        self._example_inputs = ()

    def __call__(self, *args: Any) -> Sequence[Any]:
        return self._run(*args)


class Rewrapped:
    """What takes inputs of classes of their own, called with the plain tensors that they are made of."""

    def __init__(self, unmodified: Unmodified, unwrapped: Unwrapped) -> None:
        self._unmodified, self._unwrapped = unmodified, unwrapped

    def is_decoding_step(self) -> bool:
        """See ``Unmodified``."""
        return self._unmodified.is_decoding_step()

    def prepare(self) -> Compiled:
        """See ``Unmodified``."""
        self._unmodified.prepare()
        return self

    def release(self) -> None:
        """See ``Unmodified``."""
        self._unmodified.release()

    def __call__(self, *args: Any) -> Sequence[Any]:
        return self._unmodified(*self._unwrapped.whole(args))
