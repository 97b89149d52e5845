"""What the README says of a family, and what becomes of it."""

from __future__ import annotations

import warnings
from pathlib import Path

from vlcache_fx.testing.survey.outcome import try_family
from vlcache_fx.testing.survey.table import BEGIN, END, row

README = Path(__file__).parents[3] / "README.md"


def documented_row(name: str) -> str:
    """The family's line of the README's table."""
    table = README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return line


def found_row(name: str) -> str:
    """The same line, made anew."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of transformers about its own defaults
        return row(try_family(name))
