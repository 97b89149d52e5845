"""``vlcache version``, and the option ``--version``."""

from __future__ import annotations

import typer

import vlcache_fx
from vlcache_fx.cli.output import Json, examples, print_json

EPILOG = examples("vlcache version", "vlcache version --json")


def version(as_json: Json = False) -> None:
    """Print the version; vlcache doctor has those of other packages."""
    if as_json:
        print_json({"vlcache_fx": vlcache_fx.__version__})
    else:
        typer.echo(vlcache_fx.__version__)


def print_version(is_given: bool) -> None:
    """Print the version and exit, if the option ``--version`` is given."""
    if is_given:
        typer.echo(f"vlcache {vlcache_fx.__version__}")
        raise typer.Exit
