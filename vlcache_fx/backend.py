"""The ``torch.compile`` backend: ``torch.compile(model, backend="vlcache", options={...})``.

For every graph that Dynamo hands over::

    capture -> clean up -> classify -> compile

``compiler.kinds`` has the kinds of graphs. A graph of none of them runs unmodified, for a typed reason.
"""

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.kinds import compile_traced
from vlcache_fx.compiler.regions import raise_limits, watch
from vlcache_fx.compiler.traced import Traced
from vlcache_fx.compiler.unmodified import Compiled
from vlcache_fx.options import Options
from vlcache_fx.passes.configured import configured
from vlcache_fx.runtime.gradients import gradient_refusal, records_gradients


def vlcache(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """The backend as ``torch.compile`` calls it, found through the entry point ``vlcache``.

    Graphs compiled with equal options share one engine, and so their donors: keys are complete, so models do
    not mix. ``engine_for(options)`` gives it. ``torch.compile(mode=...)`` is the option ``mode``.

    Dynamo's ``recompile_limit`` is raised in this process if it has torch's default.

    Raises:
        OptionError: an option is unknown or has a bad value.
        UnsupportedGraphError: with ``strict``, a graph that cannot be rewritten.
    """
    engine = engine_for(options if mode is None else {**(options or {}), "mode": mode})
    raise_limits()
    watch(engine)
    return compile_graph(graph_module, example_inputs, engine)


def engine_for(options: Mapping[str, Any] | None = None) -> Engine:
    """The engine that ``torch.compile(backend="vlcache")`` uses for these options in this process."""
    parsed = Options.parse(options)
    with _engine_lock:  # threads that ask at once get one engine, not one each
        return _engine(parsed)


_engine_lock = threading.Lock()


@functools.lru_cache(maxsize=32)
def _engine(options: Options) -> Engine:
    # A backend is a bare function to Dynamo; per process and options is the only place where state can live.
    return Engine(options)


def compile_graph(graph_module: fx.GraphModule, example_inputs: Sequence[Any], engine: Engine) -> Compiled:
    """Compile one graph for ``engine``. The result takes the graph's inputs and returns its outputs."""
    compiled = compile_traced(
        Traced.by_dynamo(graph_module, example_inputs, configured(engine.options)), engine
    )
    with_gradients = records_gradients(example_inputs)

    def run(*args: Any) -> Sequence[Any]:
        engine.note_graph_call()
        if not with_gradients and records_gradients(args):
            # Dynamo may skip the guards of parameters: requires_grad_() on a compiled model can come here.
            engine.bypass(gradient_refusal())
            results: Sequence[Any] = graph_module(*args)
            return results
        return compiled(*args)

    return run
