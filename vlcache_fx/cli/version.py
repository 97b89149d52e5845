"""``vlcache version``."""

from __future__ import annotations

import typer

import vlcache_fx


def version() -> None:
    """Print the version."""
    typer.echo(vlcache_fx.__version__)
