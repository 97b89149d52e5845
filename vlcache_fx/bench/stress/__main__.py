"""``python -m vlcache_fx.bench.stress``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlcache_fx.bench.machine import describe_machine, machine_line
from vlcache_fx.bench.stress.result import markdown, table
from vlcache_fx.bench.stress.run import run_stress
from vlcache_fx.bench.stress.settings import FaultRates, StressSettings
from vlcache_fx.errors import OptionError
from vlcache_fx.store.url import parse_url


def main(
    seconds: Annotated[float, typer.Option(help="duration")] = 60.0,
    processes: Annotated[int, typer.Option(min=1, help="worker processes")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="threads of each")] = 4,
    store: Annotated[
        list[str] | None,
        typer.Option(
            help="URL of a tier; repeat for more, fastest first (default: memory over a new folder)"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of requests and faults")] = 0,
    kill_s: Annotated[float, typer.Option(help="seconds between kills of a worker; 0 for none")] = 12.0,
    folder_fault_s: Annotated[
        float, typer.Option(help="seconds between two faults of the folder; 0 for none")
    ] = 0.1,
    in_place: Annotated[
        bool, typer.Option(help="also change files in place, which file:// bears with read=copy alone")
    ] = True,
    inner_faults: Annotated[bool, typer.Option(help="inject failures of the store")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="print the table in Markdown")] = False,
) -> None:
    """Share one store between processes and threads, inject faults, and compare every exact answer.

    Exit code 1 if an answer was wrong, a request failed, or a bound was exceeded.
    """
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="vlcache-stress-") as temporary:
        # Who changes files in place changes mapped ones under the eyes of their readers.
        file = f"file://{temporary}/store?capacity=800KiB&read={'copy' if in_place else 'mapped'}"
        urls = tuple(store or ("memory://?capacity=200KiB", file))
        try:
            folders = [url.address for url in map(parse_url, urls) if url.scheme == "file"]
            settings = StressSettings(
                stores=urls,
                folder=folders[0] if folders else "",
                ledger=str(Path(temporary) / "ledger"),
                seconds=seconds,
                processes=processes,
                threads=threads,
                seed=seed,
                rates=FaultRates() if inner_faults else FaultRates(0, 0, 0, 0, 0),
                folder_fault_s=folder_fault_s,
                in_place=in_place,
                kill_s=kill_s,
            )
        except OptionError as error:
            console.print(f"error: {error}")
            raise typer.Exit(2) from error
        with console.status("starting") as status:
            result = run_stress(
                settings,
                lambda now: status.update(f"{now.requests:,} requests, {now.killed} processes killed"),
            )
    machine = describe_machine()
    if as_json:
        typer.echo(json.dumps(result.as_dict() | {"machine": vars(machine)}, indent=1))
    elif as_markdown:
        typer.echo(f"{markdown(result)}\n\n{machine_line(machine)}")
    else:
        Console().print(table(result))
        typer.echo(machine_line(machine))
    for problem in result.problems:
        console.print(problem, markup=False, highlight=False)
    raise typer.Exit(0 if result.is_clean else 1)


if __name__ == "__main__":
    typer.run(main)
