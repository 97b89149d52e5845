"""The other half of the named families; in a file of its own, so that another process can run it."""

from __future__ import annotations

import pytest

from vlcache_fx.testing.survey.table import NAMED

from .families import documented_row, found_row

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", NAMED[8:])
def test_the_table_is_right(name: str) -> None:
    assert found_row(name) == documented_row(name)


def test_at_least_fourteen_are_reused() -> None:
    both = "| reuse | reuse |"
    assert sum(both in documented_row(name) for name in NAMED) >= 14
