"""The page of what works with what has the rows of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.compatibility import AREAS, PAGE, Row, Writer, lines_of, page_of, rows_of


def test_page_has_the_rows_of_collected_tests(request: pytest.FixtureRequest) -> None:
    """In a run of all tests: each row."""
    rows = rows_of(request.session.items)
    files = {item.nodeid.removeprefix("tests/").partition("::")[0] for item in request.session.items}
    listed = [line for line in lines_of(PAGE.read_text(encoding="utf-8")) if _file(line) in files]
    # Selected tests of a file (-k, ids) have fewer rows; they must be on the page.
    assert [row.line for row in rows if row.line not in listed] == []
    options = request.config.option
    if not (options.keyword or options.markexpr or _names_tests(request.config.args)):
        assert listed == [row.line for row in rows]


def test_tests_of_the_page_exist() -> None:
    files = {_file(line) for line in lines_of(PAGE.read_text(encoding="utf-8"))}
    assert len(files) > 5
    assert {name for name in files if not (PAGE.parents[1] / "tests" / name).is_file()} == set()


ROWS = [
    Row("Caches", "static", "reused", "a.py::test_b[c]"),
    Row("Generation", "beams", "refused", "d.py::test_e"),
]


def test_page_has_areas_in_order() -> None:
    page = page_of(ROWS)
    assert page.index("## Generation") < page.index("## Caches")
    assert "## Adapters" not in page
    assert set(lines_of(page)) == {row.line for row in ROWS}


class Item:
    """A collected test."""

    nodeid = "tests/a.py::test_b"

    def __init__(self, *args: str) -> None:
        self.markers = [pytest.mark.works(*args).mark]

    def iter_markers(self, name: str) -> Sequence[pytest.Mark]:
        return [marker for marker in self.markers if marker.name == name]


def test_rows_of_markers() -> None:
    item = Item("Caches", "static")
    assert rows_of([item]) == [Row("Caches", "static", "reused", "a.py::test_b")]  # type: ignore[list-item]
    with pytest.raises(ValueError, match=f"area 'cache' is not one of {AREAS[0]}"):
        rows_of([Item("cache", "static")])  # type: ignore[list-item]


def test_page_is_written_only_if_all_passed(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "page.md")
    writer._rows = ROWS
    with pytest.raises(pytest.UsageError, match=r"did not pass: a.py::test_b\[c\], d.py::test_e"):
        writer.pytest_sessionfinish(_Session())  # type: ignore[arg-type]
    assert not writer.path.exists()
    writer._passed = {row.test for row in ROWS}
    writer.pytest_sessionfinish(_Session())  # type: ignore[arg-type]
    assert writer.path.read_text(encoding="utf-8") == page_of(ROWS)


class _Session:
    exitstatus = 0


def _file(line: str) -> str:
    return line.rsplit("`", 2)[-2].partition("::")[0]


def _names_tests(args: Sequence[str]) -> bool:
    return any("::" in argument for argument in args)
