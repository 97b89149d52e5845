"""Fixtures for tests of the compiler."""

import pytest

from vlcache_fx.compiler.engine import Engine
from vlcache_fx.options import Options
from vlcache_fx.store import MemoryStore


@pytest.fixture
def eager() -> Engine:
    """An engine with eager kernels and a store of its own."""
    return Engine(Options(lowering="eager", store=MemoryStore(1 << 24)))
