"""A program is lowered once, in any thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from vlcache_fx.compiler.builders.programs import Once
from vlcache_fx.errors import LoweringError
from vlcache_fx.runtime.programs.lowered import Lowered


def test_once_lowers_for_all_threads() -> None:
    made = []

    def lower() -> Lowered:
        def run(args: Any) -> tuple[Any, ...]:
            return tuple(args)

        made.append(run)
        return run

    once = Once(lower)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: once(), range(8)))
    assert len(made) == 1
    assert all(one is made[0] for one in found)


def test_once_fails_once() -> None:
    calls = []

    def lower() -> Lowered:
        calls.append(1)
        raise LoweringError("no kernel for it")

    once = Once(lower)
    for _ in range(2):
        with pytest.raises(LoweringError, match="no kernel for it"):
            once()
    assert len(calls) == 1
