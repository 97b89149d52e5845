"""Milliseconds per step of a call."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up ``elapsed_ms`` by step."""

    def __init__(self) -> None:
        self.elapsed_ms: dict[str, float] = {}

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        """Add the time of the body to ``step``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed_ms = (time.perf_counter() - start) * 1e3
            self.elapsed_ms[step] = self.elapsed_ms.get(step, 0.0) + elapsed_ms
