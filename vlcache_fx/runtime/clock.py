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
        """Time the body as ``step``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.elapsed_ms[step] = (time.perf_counter() - start) * 1e3
