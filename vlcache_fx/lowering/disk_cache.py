"""Programs in Inductor's cache on disk."""

from __future__ import annotations


class Compilations:
    """Programs that this process took from Inductor's cache, and those that it compiled, from now on."""

    def __init__(self) -> None:
        self._before = _counts()

    @property
    def num_found(self) -> int:
        """Programs that were in the cache."""
        return self._since("fxgraph_cache_hit")

    @property
    def num_compiled(self) -> int:
        """Programs that were not."""
        return self._since("fxgraph_cache_miss") + self._since("fxgraph_cache_bypass")

    def _since(self, name: str) -> int:
        return _counts()[name] - self._before[name]


def _counts() -> dict[str, int]:
    from torch._dynamo.utils import counters

    names = ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")
    return {name: int(counters["inductor"][name]) for name in names}
