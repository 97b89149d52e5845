"""What the commands of studies share: errors, progress and results on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import typer
from rich.console import Console, RenderableType
from rich.progress import track

from vlcache_fx.bench.machine import describe_machine, machine_line
from vlcache_fx.errors import VlcacheError

Step = TypeVar("Step")

WIDTH = 140
"""Characters per line of files and pipes."""


@contextmanager
def readable_errors() -> Iterator[None]:
    """Print errors of this package, and missing packages, without a traceback; exit with status 1."""
    try:
        yield
    except (VlcacheError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def asking(steps: Sequence[Step]) -> Iterable[Step]:
    """Return the steps of a study, with a progress bar on stderr."""
    return track(steps, "asking", console=Console(stderr=True), transient=True)


def print_results(*results: RenderableType) -> None:
    """Print results, and a line that names the machine."""
    console = Console(width=None if Console().is_terminal else WIDTH)
    for result in results:
        console.print(result)
    console.print(machine_line(describe_machine()), highlight=False)
