"""What torch loads for ``torch.compile(model, backend="vlcache")``, once per process, before it traces.

Importing this module does nothing. Looking up ``vlcache`` substitutes the recurrences of all models that are
imported by then, so that Dynamo traces them as one node each. Without it, the backend would do so when Dynamo
has traced their loops, which takes long, for nothing.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "vlcache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vlcache_fx.backend import vlcache
    from vlcache_fx.integrations.recurrences import substitute_recurrences

    substitute_recurrences()
    return vlcache
