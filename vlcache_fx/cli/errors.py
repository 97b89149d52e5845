"""Errors on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from vlcache_fx.errors import VlcacheError


@contextmanager
def readable_errors() -> Iterator[None]:
    """Print errors of this package without a traceback, and exit with status 1."""
    try:
        yield
    except VlcacheError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
