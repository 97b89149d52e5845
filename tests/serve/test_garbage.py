"""Garbage of traces is collected when they have ended."""

from __future__ import annotations

import gc
import weakref

import pytest

from vlcache_fx.serve.garbage import collected_afterwards


class Cycle:
    def __init__(self) -> None:
        self.own = self


def test_garbage_goes_after_the_body() -> None:
    with collected_afterwards():
        assert not gc.isenabled()
        found = weakref.ref(Cycle())
        assert found() is not None
    assert gc.isenabled()
    assert found() is None


def test_a_failure_enables_it_again() -> None:
    with pytest.raises(ValueError, match="failed"), collected_afterwards():
        raise ValueError("failed")
    assert gc.isenabled()


def test_it_stays_off_where_it_was_off() -> None:
    gc.disable()
    try:
        with collected_afterwards():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
