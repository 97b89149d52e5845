"""The table of what works with what: rows are tests with the marker ``works``.

    python -m pytest -m works --thorough --write-compatibility docs/compatibility.md

writes the page from the tests that passed; ``tests/docs/test_compatibility.py`` compares it with the markers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/compatibility.md"
AREAS = (
    "torch.compile",
    "Generation",
    "Caches",
    "Inputs",
    "Quantisation",
    "Adapters",
    "Weights",
    "Training",
    "Deployment",
)
"""Parts of the page, in order."""

HEAD = """# Compatibility

On this page you find what works with what. Each row is a test; its result is that of the test. "Reused"
means that, with all rows recomputed, the answer is that of the unmodified model, and that a call found the
donor of an earlier one. [Model families](families.md) lists models.

`python -m pytest -m works --thorough --write-compatibility docs/compatibility.md` writes this page.
"""


@dataclass(frozen=True, order=True)
class Row:
    """A row of the page.

    Attributes:
        area: of ``AREAS``.
        what: what is used.
        result: what happens.
        test: file and name of the test, from ``tests/``.
    """

    area: str
    what: str
    result: str
    test: str

    @property
    def file(self) -> str:
        """File of the test."""
        return self.test.partition("::")[0]

    @property
    def line(self) -> str:
        """The row in Markdown."""
        return f"| {self.what} | {self.result} | `{self.test}` |"


def rows_of(items: Iterable[pytest.Item]) -> list[Row]:
    """Return the rows of collected tests.

    Raises:
        ValueError: a marker has no valid area.
    """
    found = []
    for item in items:
        for marker in item.iter_markers("works"):
            area, what, *result = marker.args
            if area not in AREAS:
                raise ValueError(f"{item.nodeid}: area {area!r} is not one of {', '.join(AREAS)}")
            test = item.nodeid.removeprefix("tests/")
            found.append(Row(area, what, *(result or ["reused"]), test))
    return sorted(found, key=lambda row: (AREAS.index(row.area), row))


def page_of(rows: Sequence[Row]) -> str:
    """Return the page."""
    lines = [HEAD]
    for area in AREAS:
        own = [row.line for row in rows if row.area == area]
        if own:
            lines += [f"## {area}\n", "| what | result | test |", "|---|---|---|", *own, ""]
    return "\n".join(lines)


def lines_of(page: str) -> list[str]:
    """Return the rows of a page."""
    return [line for line in page.splitlines() if line.startswith("| ") and line.endswith("` |")]


class Writer:
    """Writes the page after a run: a plug-in of pytest.

    Args:
        path: the page.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[Row] = []
        self._passed: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Keep the rows of the tests that will run."""
        self._rows = rows_of(session.items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the tests that passed."""
        if report.when == "call" and report.passed:
            self._passed.add(report.nodeid.removeprefix("tests/"))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the page.

        Raises:
            pytest.UsageError: a test with a row did not pass.
        """
        missing = [row.test for row in self._rows if row.test not in self._passed]
        if missing:
            raise pytest.UsageError(f"not written, since these did not pass: {', '.join(missing)}")
        assert session.exitstatus == 0
        self.path.write_text(page_of(self._rows), encoding="utf-8")
