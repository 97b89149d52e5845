"""The first half of the named families, through both entries, as the README has them."""

from __future__ import annotations

import pytest

from vlcache_fx.testing.survey.table import NAMED

from .families import documented_row, found_row

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", NAMED[:8])
def test_the_table_is_right(name: str) -> None:
    assert found_row(name) == documented_row(name)
