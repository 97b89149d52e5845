"""``vlcache top``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.live import Live

from vlcache_fx.cli.errors import readable_errors
from vlcache_fx.cli.metrics_sample import fetch, metrics_url, parse_sample
from vlcache_fx.cli.metrics_summary import Summary, summarize
from vlcache_fx.cli.metrics_tables import summary_tables
from vlcache_fx.cli.output import examples, print_json, result_console

EPILOG = examples(
    "vlcache top",
    "vlcache top http://10.0.0.1:8000 --interval 5",
    "vlcache top --once --json",
)


def top(
    url: Annotated[
        str, typer.Argument(help="URL of a server, or of its metrics")
    ] = "http://127.0.0.1:8000/metrics",
    interval: Annotated[float, typer.Option(min=0.1, help="seconds between samples")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="take one sample, and exit")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object per sample to stdout, and nothing else")
    ] = False,
) -> None:
    """Watch a server: calls by mode and reason, tokens, stores, and times to first tokens. Ctrl-C ends it."""
    with readable_errors():
        address = metrics_url(url)
        summaries = _summaries(address, interval, once)
        console = result_console()
        if as_json:
            for summary in summaries:
                print_json(summary.as_dict(), indent=None)
        elif once or not console.is_terminal:
            for summary in summaries:
                console.print(summary_tables(summary, address))
        else:
            first = summary_tables(next(summaries), address)
            with Live(first, console=console, auto_refresh=False) as live:
                for summary in summaries:
                    live.update(summary_tables(summary, address), refresh=True)


def _summaries(url: str, interval_s: float, once: bool) -> Iterator[Summary]:
    """Yield a summary per sample; the first one at once."""
    before = None
    while True:
        sample = parse_sample(fetch(url), time.monotonic())
        yield summarize(sample, before)
        if once:
            return
        before = sample
        time.sleep(interval_s)
