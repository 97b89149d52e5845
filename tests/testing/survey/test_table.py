"""Outcomes as a table in a document."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from vlcache_fx.testing.survey.__main__ import main
from vlcache_fx.testing.survey.families import known_families
from vlcache_fx.testing.survey.outcome import Outcome
from vlcache_fx.testing.survey.table import BEGIN, END, NAMED, markdown, write_into

LLAVA = Outcome("llava", "Llava", {"vlcache_fx.compile": "reuse", "torch.compile": "reuse"})
REFUSED = Outcome(
    "qwen3_5",
    "Qwen",
    {"vlcache_fx.compile": "refused: x", "torch.compile": "not reused"},
    "conv1d",
)
UNBUILT = Outcome("other", "Other", {}, "TypeError: no")
ODD = Outcome("odd", "Odd", {"vlcache_fx.compile": "reuse", "torch.compile": "not reused"})


def test_markdown_rows_and_lists() -> None:
    lines = markdown([UNBUILT, REFUSED, ODD, LLAVA]).splitlines()
    assert lines[2] == "| llava | `Llava` | reuse | reuse |  |"
    assert lines[3] == "| qwen3_5 | `Qwen` | refused: x | not reused | conv1d |"
    assert "- reuse through `vlcache_fx.compile`; not reused through `torch.compile`: odd" in lines
    assert lines[-3:] == ["Not tried:", "", "- other: TypeError: no"]


def test_reasons_in_lists() -> None:
    refused = [Outcome(name, "Mixer", {"torch.compile": "refused: x"}, "convolves") for name in ("a", "b")]
    assert "- refused: x (convolves): a, b" in markdown(refused).splitlines()


def test_row_of_missing_entry() -> None:
    outcome = Outcome("llava", "Llava", {"torch.compile": "reuse"})
    assert "| llava | `Llava` | not run | reuse |  |" in markdown([outcome])


def test_write_into_replaces_the_table(tmp_path: Path) -> None:
    document = tmp_path / "families.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nbehind\n")
    write_into(document, "new")
    assert document.read_text() == f"before\n{BEGIN}\nnew\n{END}\nbehind\n"


def test_write_into_document_without_marks(tmp_path: Path) -> None:
    document = tmp_path / "families.md"
    document.write_text("nothing\n")
    with pytest.raises(ValueError, match="families: begin"):
        write_into(document, "new")
    assert document.read_text() == "nothing\n"


def test_main_unknown_families() -> None:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["llava", "no_such_family"])
    assert result.exit_code == 2
    assert "no_such_family" in result.output
    assert "qwen2_5_vl" in result.output


def test_named_families_exist_in_transformers() -> None:
    assert set(NAMED) <= set(known_families())
