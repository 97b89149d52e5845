"""Milliseconds per step of a call."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Collects ``elapsed_ms`` by step name."""

    def __init__(self) -> None:
        self.elapsed_ms: dict[str, float] = {}

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        """Time the body as ``step``, in addition to what that step took before."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed_ms = (time.perf_counter() - start) * 1e3
            self.elapsed_ms[step] = self.elapsed_ms.get(step, 0.0) + elapsed_ms
