"""Bars on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
from rich.console import Console

from vlcache_fx.cli import progress
from vlcache_fx.cli.progress import showing_progress

LOG = logging.getLogger("vlcache_fx")


@pytest.fixture(autouse=True)
def _without_variable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(progress, "apply_log_variable", lambda: False)
    before = (LOG.level, [*LOG.handlers])
    yield
    assert before == (LOG.level, LOG.handlers)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    """The terminal of stderr; ``file`` has what is drawn."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(progress, "progress_console", lambda: console)
    return console


def drawn(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_bar_shows_steps_counts_and_what_is_compiled(terminal: Console) -> None:
    with showing_progress("loading a model") as steps:
        assert isinstance(steps, progress._Bars)
        steps.bar.refresh()
        assert "loading a model" in drawn(terminal)
        steps.begin("asking prompts", 4)
        steps.advance(3)
        LOG.debug("vlcache: compiling %s", "cold/layer.0")
        steps.bar.refresh()
        last = drawn(terminal).rpartition("asking prompts")[2]
        assert "3/4" in last
        assert "0:00:0" in last
        assert "compiling cold/layer.0 (1)" in last
        steps.show("timing", 1, 2)
        steps.bar.refresh()
        last = drawn(terminal).rpartition("timing")[2]
        assert "1/2" in last
        assert "compiling" not in last


def test_log_scrolls_above_the_bar(terminal: Console) -> None:
    with showing_progress("compiling"):
        LOG.info("vlcache: compiled %s in [1] s", "this")
    assert "vlcache: compiled this in [1] s\n" in drawn(terminal)
    assert drawn(terminal).endswith("\x1b[2K")  # the bar is gone


class Costly:
    """A graph, in logs of the level debug."""

    def __str__(self) -> str:
        raise AssertionError("formatted")


def test_other_messages_of_the_level_debug_are_not_formatted(terminal: Console) -> None:
    with showing_progress("compiling") as steps:
        assert isinstance(steps, progress._Bars)
        record = logging.LogRecord(LOG.name, logging.DEBUG, "", 0, "%s", (Costly(),), None)
        progress._AboveBar(steps).emit(record)
    assert "AssertionError" not in drawn(terminal)


def test_lines_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with showing_progress("loading a model") as steps:
        steps.begin("asking prompts", 4)
        steps.advance(4)
        for done in range(3):
            steps.show("timing", done, 3)
        LOG.info("vlcache: compiled this")
        LOG.debug("vlcache: compiling that")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "loading a model",
        "asking prompts: 4",
        "timing",
        "vlcache: compiled this",
    ]


def test_bar_is_on_the_terminal_of_results(terminal: Console, capsys: pytest.CaptureFixture[str]) -> None:
    results = Console(file=io.StringIO(), force_terminal=True)
    with showing_progress("checking", console=results) as steps:
        assert isinstance(steps, progress._Bars)
        assert steps.bar.console is results
    with showing_progress("checking", console=Console(file=io.StringIO())) as steps:
        assert isinstance(steps, progress._Bars)
        assert steps.bar.console is terminal
    assert capsys.readouterr().err == ""


def test_no_bar_where_the_variable_shows_the_log(terminal: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "apply_log_variable", lambda: True)
    with showing_progress("checking"):
        pass
    assert drawn(terminal) == ""


@pytest.mark.usefixtures("terminal")
def test_bar_ends_with_an_error() -> None:
    with pytest.raises(ValueError, match="no"), showing_progress("checking"):
        raise ValueError("no")
