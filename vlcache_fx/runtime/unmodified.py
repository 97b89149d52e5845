"""What was captured, as it was: for whatever cannot be rewritten."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import fx

from vlcache_fx.capture.steps import is_decoding_step
from vlcache_fx.capture.wrapped import Unwrapped
from vlcache_fx.runtime.engine import Engine

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
        if self._engine.options.lowering == "inductor":
            from torch._inductor.compile_fx import compile_fx

            compiled: Any = compile_fx(
                self._graph_module,
                list(self._example_inputs),
                config_patches=self._engine.options.inductor_config,
            )
            self._run = compiled
        self.release()
        return self._run

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
