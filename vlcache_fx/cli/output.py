"""What commands print: results on stdout, progress and logs on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeAlias

import typer
from rich.console import Console

from vlcache_fx.errors import OptionError

Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="print the result as JSON to stdout, and nothing else")
]

PIPE_WIDTH = 10_000
"""Characters per line of files and pipes: no column of a table is cut, and no line is wrapped."""


def result_console() -> Console:
    """Return a console on stdout; as wide as its tables for files and pipes."""
    return Console() if Console().is_terminal else Console(width=PIPE_WIDTH)


def progress_console() -> Console:
    """Return a console on stderr."""
    return Console(stderr=True)


def print_json(data: Any, *, indent: int | None = 1, file: TextIO | None = None) -> None:
    """Print JSON to stdout.

    Args:
        data: what the standard library can write.
        indent: spaces per level; None for one line.
        file: the stdout of before ``stdout_for_json``, in its body.
    """
    typer.echo(json.dumps(data, indent=indent), file=file)


@contextmanager
def stdout_for_json(as_json: bool) -> Iterator[None]:
    """With ``as_json``, send to stderr what the body and its libraries print."""
    if not as_json:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def check_output_file(path: Path) -> None:
    """Check that a result can be written to a file, before the work that makes it; nothing is created.

    Raises:
        OptionError: it cannot be written.
    """
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        problem = "it is a folder" if path.is_dir() else "no permission"
        raise OptionError(f"the file {str(path)!r} cannot be written: {problem}")
    check_output_folder(path.parent)


def check_output_folder(path: Path) -> None:
    """Check that results can be written to a folder, or that it can be created; nothing is created.

    Raises:
        OptionError: neither.
    """
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        problem = "no permission to write to" if there.is_dir() else "this is no folder:"
        raise OptionError(f"the folder {str(path)!r} cannot be written to: {problem} {str(there)!r}")


def examples(*lines: str) -> str:
    """Return the end of a command's help: lines that a user can copy."""
    return "\n\n".join(("Examples:", *(f"$ {line}" for line in lines)))
