"""Measurements of tiny models in tests: their times are not checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from vlcache_fx.bench import rounds, run
from vlcache_fx.bench.rates import measure_rates


@contextmanager
def quick_rounds() -> Iterator[None]:
    """Collect no garbage before each run: among the objects of all tests, that takes longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "gc", SimpleNamespace(collect=lambda: 0))
        yield


@contextmanager
def quick_rates() -> Iterator[None]:
    """Measure the machine with small tensors."""

    def measure(dtype: Any, device: Any) -> Any:
        return measure_rates(dtype, device, width=16, size_bytes=4096)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "measure_rates", measure)
        yield
