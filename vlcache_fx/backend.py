"""The ``torch.compile`` backend: ``torch.compile(model, backend="vlcache", options={...})``.

Each graph from Dynamo takes four steps::

    capture -> clean up -> classify -> compile

``compiler.kinds`` lists the kinds of graphs. Any other graph runs unmodified, and the report has the reason.
"""

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from vlcache_fx.compiler.dry_run import explain_only
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.kinds import compile_traced
from vlcache_fx.compiler.regions import raise_limits, watch
from vlcache_fx.compiler.traced import Traced
from vlcache_fx.compiler.unmodified import Compiled
from vlcache_fx.integrations.recurrences import substitute_recurrences, takes_recurrences, trace_again
from vlcache_fx.options import Options
from vlcache_fx.passes.configured import configured
from vlcache_fx.runtime.gradients import gradient_refusal, records_gradients


@takes_recurrences
def vlcache(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile a graph for ``torch.compile``, which finds this function by the entry point ``vlcache``.

    Graphs compiled with equal options share one engine, ``engine_for(options)``, and its store. Keys cover
    the weights, so models do not share donors. ``torch.compile(mode=...)`` sets the option ``mode``.

    Raises Dynamo's ``recompile_limit`` in this process, unless it was changed from torch's default.

    Raises:
        OptionError: an option is unknown or has a bad value.
        UnsupportedGraphError: the graph cannot be rewritten, and ``strict`` is set.
    """
    trace_again(substitute_recurrences())
    engine = engine_for(options if mode is None else {**(options or {}), "mode": mode})
    raise_limits()
    watch(engine)
    return compile_graph(graph_module, example_inputs, engine)


def engine_for(options: Mapping[str, Any] | None = None) -> Engine:
    """Return the engine of ``torch.compile(backend="vlcache", options=options)`` in this process."""
    parsed = Options.parse(options)
    with _engine_lock:  # lru_cache alone may create one engine per thread
        return _engine(parsed)


_engine_lock = threading.Lock()


@functools.lru_cache(maxsize=32)
def _engine(options: Options) -> Engine:
    # Dynamo takes a bare function as a backend, so its state belongs to the process and the options.
    return Engine(options)


def compile_graph(graph_module: fx.GraphModule, example_inputs: Sequence[Any], engine: Engine) -> Compiled:
    """Compile a graph for ``engine`` into a function from the graph's inputs to its outputs."""
    traced = Traced.by_dynamo(graph_module, example_inputs, configured(engine.options))
    compiled = (explain_only if engine.options.dry_run else compile_traced)(traced, engine)
    with_gradients = records_gradients(example_inputs)

    def run(*args: Any) -> Sequence[Any]:
        with engine.idle.request():
            return serve(*args)

    def serve(*args: Any) -> Sequence[Any]:
        engine.note_graph_call()
        if not with_gradients and records_gradients(args):
            # Dynamo may skip guards on parameters, so requires_grad_() need not cause a recompilation.
            engine.bypass(gradient_refusal())
            results: Sequence[Any] = graph_module(*args)
            return results
        return compiled(*args)

    return run
