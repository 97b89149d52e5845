"""What ``vlcache fidelity`` and ``vlcache calibrate`` share: options about prompts, and a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

DATA = typer.Option(
    help="prompts, one JSON object a line: images (paths), prompt, answer; lines about the same images "
    "reuse them [default: the model's own questions]"
)
POSITIONS = typer.Option(help="answer tokens compared at most")


def wide_console() -> Console:
    """The terminal, or 120 characters where output goes to a file or a pipe."""
    return Console() if Console().is_terminal else Console(width=120)


@contextmanager
def progress(console: Console, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that is gone at the end; the function that it yields advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.advance(task, done)
