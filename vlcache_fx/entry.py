"""What torch loads for ``torch.compile(model, backend="vlcache")``: once per process, before it traces a graph.

Importing this module does nothing. Looking ``vlcache`` up registers the recurrences of all models that are imported
by then, so that Dynamo traces each as one node: a graph with unrolled loops takes long to trace, to be thrown away.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "vlcache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vlcache_fx.backend import vlcache
    from vlcache_fx.integrations.recurrences import substitute_recurrences

    substitute_recurrences()
    return vlcache
