"""Errors on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from vlcache_fx.errors import VlcacheError


@contextmanager
def readable_errors(status: int = 1) -> Iterator[None]:
    """Print errors of this package without a traceback, and exit with ``status``."""
    try:
        yield
    except VlcacheError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(status) from error
