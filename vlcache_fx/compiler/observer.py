"""An engine that computes a call as another engine would, and leaves no trace in it."""

from __future__ import annotations

from dataclasses import replace

from vlcache_fx.compiler.engine import Engine
from vlcache_fx.store.read_only import ReadOnlyStore


def observer_of(engine: Engine) -> Engine:
    """Return an engine for explanations of calls of ``engine``.

    It reads the same store and writes nothing to it. It has the same settings, fingerprints, guards and notes
    of encoders, and copies of what ``engine`` remembers of earlier calls, so that the call is treated as the
    next one would be. It lowers like ``engine`` if that has graphs already, so that what it compiles is
    compiled for both, and otherwise with eager kernels.
    """
    options = engine.options
    lowering = options.lowering if engine.graphs and options.lowering != "tensorrt" else "eager"
    observer = Engine(
        replace(
            options,
            store=ReadOnlyStore(engine.store),
            lowering=lowering,
            profile=None,
            shadow=0.0,
            idle_refinement=0.0,
            strict=False,
            cuda_graphs=False,
            mode=None,
            dry_run=False,
        )
    )
    observer.model = engine.model
    if lowering == options.lowering:
        observer.lowering, observer.compile_cache = engine.lowering, engine.compile_cache
    observer.settings, observer.fingerprints, observer.pending = (
        engine.settings,
        engine.fingerprints,
        engine.pending,
    )
    observer.guards, observer.observed = engine.guards.without_runs(), engine.observed
    observer.missed, observer.unstorable = engine.missed.copy(), engine.unstorable.copy()
    observer.misses, observer.returns = engine.misses.copy(), engine.returns.copy()
    return observer
