"""Each module here compiles its own models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .helpers import own_compiler_state


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> Iterator[None]:
    with own_compiler_state():
        yield
