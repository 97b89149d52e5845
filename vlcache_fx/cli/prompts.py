"""Shared by ``vlcache fidelity``, ``calibrate`` and ``gate``: options for prompts, and a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlcache_fx.cli.output import progress_console

DATA = typer.Option(
    help="prompts, one JSON object per line: images (paths), prompt, answer; repeated images are reused "
    "(default: the model's own questions)"
)
POSITIONS = typer.Option(
    help="maximum number of answer tokens to compare (default: those of the model's own questions, or 1)"
)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a transient progress bar on stderr; yield the function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_console(), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.advance(task, done)
