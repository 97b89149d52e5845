"""The console script ``vlcache``."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

import vlcache_fx
from vlcache_fx.errors import VlcacheError

app = typer.Typer(
    help="Reuse of vision encoder outputs and KV caches for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(vlcache_fx.__version__)


@app.command()
def policies() -> None:
    """List the policies that are installed."""
    from vlcache_fx.policies import get_policy, known_policies  # here: torch takes a second to import

    table = Table("policy", "implementation", "what it recomputes")
    try:
        for name, entry in known_policies().items():
            summary = (type(get_policy(name)).__doc__ or "").strip().partition("\n\n")[0]
            table.add_row(name, entry.value, " ".join(summary.split()))
    except VlcacheError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    Console().print(table)
