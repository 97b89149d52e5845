"""What a command is doing, and for how long: a bar on a terminal, lines elsewhere, all on stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from vlcache_fx.cli.output import progress_console
from vlcache_fx.log_output import apply_log_variable

COMPILING = "vlcache: compiling "
"""Beginning of the messages, of the level ``debug``, that name what is compiled."""

LOG = logging.getLogger("vlcache_fx")


class Steps:
    """The steps of a command: each has a bar of its own on a terminal, and a line elsewhere."""

    _shown = ""

    def begin(self, what: str, total: int | None = None) -> None:
        """Begin the next step.

        Args:
            what: what it does, such as ``asking prompts``.
            total: number of its parts; None where it is unknown.
        """
        typer.echo(what if total is None else f"{what}: {total}", err=True)

    def advance(self, count: int = 1) -> None:
        """Count finished parts of the step."""

    def show(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` parts are finished, and which is next; elsewhere its name alone."""
        del done, total
        if what != self._shown:
            self.begin(what)
        self._shown = what


@contextmanager
def showing_progress(
    what: str, total: int | None = None, *, console: Console | None = None
) -> Iterator[Steps]:
    """Show what the body does, and the package's log from ``info`` on; ``VLCACHE_LOG`` chooses another level.

    On a terminal a bar with a clock, which also names what is compiled; the log scrolls above it. Elsewhere
    plain lines.

    Args:
        what: the first step; see ``Steps.begin``.
        total: number of its parts.
        console: of results that the body prints. If it is a terminal, the bar is on it, below them.
    """
    steps: Steps = Steps()
    handler: logging.Handler | None = None
    if not apply_log_variable():  # otherwise the log goes to stderr already, and would tear a bar apart
        shown = console if console is not None and console.is_terminal else progress_console()
        steps = _Bars(shown) if shown.is_terminal else steps
        handler = _AboveBar(steps) if isinstance(steps, _Bars) else _Lines()
    with _logging_to(handler):
        steps.begin(what, total)
        try:
            yield steps
        finally:
            if isinstance(steps, _Bars):
                steps.end()


class _Bars(Steps):
    """A bar of ``rich``."""

    def __init__(self, console: Console) -> None:
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            _Count(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
            transient=True,
        )
        self._task = self.bar.add_task("", note="")
        self._num_compiled = 0
        self.bar.start()

    def begin(self, what: str, total: int | None = None) -> None:
        """See ``Steps``."""
        self.bar.remove_task(self._task)
        self._task = self.bar.add_task(what, total=total, note="")

    def advance(self, count: int = 1) -> None:
        """See ``Steps``."""
        self.bar.update(self._task, advance=count, note="")

    def show(self, what: str, done: int, total: int) -> None:
        """See ``Steps``."""
        self.bar.update(self._task, description=what, completed=done, total=total, note="")

    def note_compilation(self, name: str) -> None:
        """Show what is compiled."""
        self._num_compiled += 1
        self.bar.update(self._task, note=f"compiling {name} ({self._num_compiled})")

    def end(self) -> None:
        """Take the bar away."""
        self.bar.stop()


class _Count(ProgressColumn):
    """Finished and all parts of a step; empty where their number is unknown."""

    def render(self, task: Task) -> Text:
        """See ``rich``."""
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")


class _Lines(logging.StreamHandler):  # type: ignore[type-arg]
    """The log as lines on stderr."""

    def __init__(self) -> None:
        super().__init__()
        self.setLevel(logging.INFO)


class _AboveBar(logging.Handler):
    """The log above a bar, and in the bar what is compiled."""

    def __init__(self, bars: _Bars) -> None:
        super().__init__(logging.DEBUG)
        self._bars = bars

    def emit(self, record: logging.LogRecord) -> None:
        """Show a message. Those of the level ``debug`` may be costly to format."""
        is_compilation = str(record.msg).startswith(COMPILING)
        if is_compilation:
            self._bars.note_compilation(record.getMessage().removeprefix(COMPILING))
        elif record.levelno >= logging.INFO:
            self._bars.bar.console.print(record.getMessage(), highlight=False, markup=False)


@contextmanager
def _logging_to(handler: logging.Handler | None) -> Iterator[None]:
    """Send the package's log to a handler in the body."""
    if handler is None:
        yield
        return
    level = LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(min(level or handler.level, handler.level))
    try:
        yield
    finally:
        LOG.setLevel(level)
        LOG.removeHandler(handler)
        handler.close()
