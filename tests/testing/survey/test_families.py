"""Named families, through both entries: the README's table says what becomes of them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from vlcache_fx.testing.survey.outcome import ENTRIES, try_family
from vlcache_fx.testing.survey.table import BEGIN, END, NAMED, row

README = Path(__file__).parents[3] / "README.md"

EVERY_TIME = frozenset({"qwen3_vl"})
"""The one with features in inner layers. Qwen2.5-VL, LLaVA and Mllama are in other tests."""


def documented_row(name: str) -> str:
    """The family's line of the README's table."""
    table = README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return line


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_the_table_is_right(name: str, request: pytest.FixtureRequest) -> None:
    if name not in EVERY_TIME and not request.config.getoption("--all-families"):
        pytest.skip("takes half a minute; pass --all-families")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of transformers about its own defaults
        outcome = try_family(name)
    assert row(outcome) == documented_row(name)


def test_at_least_fourteen_are_reused_through_both_entries() -> None:
    reused = "| reuse " * len(ENTRIES)
    assert sum(reused in documented_row(name) for name in NAMED) >= 14
