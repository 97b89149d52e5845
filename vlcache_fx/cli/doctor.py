"""``vlcache doctor``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from vlcache_fx.cli.errors import readable_errors
from vlcache_fx.cli.output import (
    Json,
    examples,
    print_json,
    result_console,
    stdout_for_json,
)
from vlcache_fx.cli.progress import showing_progress

if TYPE_CHECKING:
    from rich.console import Console

    from vlcache_fx.doctor import Check

EPILOG = examples(
    "vlcache doctor",
    "vlcache doctor --store file:///cache --store mooncake://10.0.0.1:50051",
    "vlcache doctor --json",
)

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def doctor(
    store: Annotated[list[str] | None, typer.Option(help="store URLs to check (default: memory://)")] = None,
    as_json: Json = False,
) -> None:
    """Check the installation: versions, compiler, GPU, stores, and a small model that reuses an image.

    Exit status 1 if a check failed. A store's folder is created if it does not exist.
    """
    with readable_errors():
        console = result_console()
        found: list[Check] = []
        shown = None if as_json else console
        with showing_progress("checking", console=shown), stdout_for_json(as_json):
            from vlcache_fx.doctor import checklist  # deferred: importing torch takes a second

            for check in checklist(tuple(store or ("memory://",))):
                found.append(check)
                if not as_json:
                    _show(check, console)
        counts = {str(status): count for status, count in Counter(check.status for check in found).items()}
        if as_json:
            print_json({"passed": "failed" not in counts, "checks": [check.as_dict() for check in found]})
        else:
            console.print(", ".join(f"{counts[status]} {status}" for status in STYLES if status in counts))
        if "failed" in counts:
            raise typer.Exit(1)


def _show(check: Check, console: Console) -> None:
    line = Text()
    line.append(f"{check.status:<8}", style=STYLES[check.status])
    line.append(f"{check.name}: ", style="bold")
    line.append(check.found)
    console.print(line)
    if check.advice:
        console.print(Text(f"        -> {check.advice}", style="" if check.status == "ok" else "bold"))
