"""Measurements are quick here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .quick import quick_rounds


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with quick_rounds():
        yield
