"""Compare servers under load: ``python -m examples.serve_load --output serve_load.json``.

Each server answers the same traces: questions with known answers (the reference VLM), and, for times, prompts
for a model of 127 M parameters with random weights. All run in one environment, with the same weights, one
after the other, on the same cores. The client of OpenAI sends the requests, or vLLM's benchmark of servers.
"""

from __future__ import annotations

import asyncio
import functools
import json
from itertools import product
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from rich.console import Console
from rich.table import Table

from examples.serve_load import load, packages, vllm_bench
from examples.serve_load.models import PIXELS_OF_TOKEN, write_models
from examples.serve_load.systems import SYSTEMS, System, log_of, serving
from examples.serve_load.traces import TRACES, Ask, questions
from examples.vs_vllm.__main__ import default_folder, own_cores
from examples.vs_vllm.environment import Environment
from examples.vs_vllm.errors import PeerError
from vlcache_fx.bench.machine import describe_machine, machine_line

PORT = 18473
WARM_UP_SEED, SEED = 1000, 0
CONSOLE_WIDTH = 160
CLIENTS = ("openai", "vllm-bench")
OF_SESSIONS = ("agent", "chat")
"""Traces whose requests must follow each other, which vLLM's benchmark cannot do."""


def main(
    environment: Annotated[Path | None, typer.Option(help="folder for vLLM and the models")] = None,
    requests: Annotated[int, typer.Option(min=1, help="requests of each trace")] = 32,
    asked: Annotated[int, typer.Option(min=0, help="questions with an answer; 0 for none")] = 60,
    at_once: Annotated[list[int] | None, typer.Option(min=1, help="sessions at a time (default: 4)")] = None,
    vision_tokens: Annotated[int, typer.Option(min=16, help="vision tokens of a picture")] = 1024,
    answer_tokens: Annotated[int, typer.Option(min=1, help="tokens of an answer")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="requests that a server runs together")] = 4,
    client: Annotated[str, typer.Option(help="openai, or vllm-bench")] = "openai",
    system: Annotated[list[str] | None, typer.Option(help="servers to compare (default: all)")] = None,
    trace: Annotated[list[str] | None, typer.Option(help="traces for times (default: all)")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
) -> None:
    """Time servers on traces in which pictures return."""
    if client not in CLIENTS:
        raise typer.BadParameter(f"{client!r} is no client: it must be one of {', '.join(CLIENTS)}")
    console = Console() if Console().is_terminal else Console(width=CONSOLE_WIDTH)
    kept = Environment((environment or default_folder()).absolute())
    side = round(vision_tokens**0.5) * PIXELS_OF_TOKEN
    cores = own_cores(0)
    chosen = [one for one in SYSTEMS if not system or one.name in system]
    possible = [name for name in TRACES if client == "openai" or name not in OF_SESSIONS]
    traces = {name: TRACES[name] for name in possible if not trace or name in trace}

    def send_to(url: str, one: System, folder: Path, asks: list[Ask], clients: int) -> dict[str, Any]:
        model = one.served_name or str(folder)
        how: Any = {"at_once": clients, "answer_tokens": answer_tokens, "extra_body": one.extra_body}
        if client == "openai":
            return asyncio.run(load.send(asks, url, model, **how)).summary(asks)
        return vllm_bench.send(asks, url, model, folder, kept, **how).summary(asks)

    levels = list(enumerate(at_once or [4]))  # each has pictures of its own
    sent = {"reference": asked_questions(asked, levels)} if asked else {}
    sent["times"] = (
        [ask for make in traces.values() for ask in make(8, WARM_UP_SEED, side)],
        [
            (name, clients, make(requests, SEED + level, side))
            for level, clients in levels
            for name, make in traces.items()
        ],
    )
    rows: list[dict[str, Any]] = []
    try:
        for make in (kept.make, functools.partial(packages.install, kept)):
            make(
                lambda step: console.print(f"building the environment: {step}", highlight=False, markup=False)
            )
        folders = write_models(kept.folder / "models", vision_tokens)
        for one, (model, (first, loads)) in product(chosen, sent.items()):
            with serving(one, folders[model], PORT, kept, cores, batch_size) as url:
                console.print(f"{one.name}: ready with the model {model}", highlight=False)
                if send_to(url, one, folders[model], first, 4)["failed"]:
                    raise PeerError(f"{one.name} does not answer; its output is in {log_of(one, kept)}")
                for title, clients, asks in loads:
                    found = send_to(url, one, folders[model], asks, clients)
                    rows.append({"system": one.name, "trace": title, "clients": clients, **found})
                    console.print(f"{one.name}, {title}: {json.dumps(rows[-1])}", highlight=False)
    except PeerError as error:
        failure: PeerError | None = error
    else:
        failure = None
    machine = describe_machine()
    if rows:  # also those of the servers before one that failed
        console.print(results_table(rows))
        console.print(machine_line(machine), highlight=False)
    if output is not None:
        output.write_text(json.dumps({"machine": vars(machine), "rows": rows}, indent=1, default=str) + "\n")
    if failure is not None:
        console.print(f"error: {failure}", highlight=False, markup=False)
        raise typer.Exit(1)


Loads: TypeAlias = list[tuple[str, int, list[Ask]]]
"""Name of the trace, sessions at a time, requests."""


def asked_questions(count: int, levels: list[tuple[int, int]]) -> tuple[list[Ask], Loads]:
    """Questions for the reference VLM: those that warm a server up, and those that are measured."""
    measured: Loads = []
    for level, clients in levels:
        seed = SEED + 2 * level
        measured += [
            ("questions, pictures return", clients, questions(count, seed, returning=True)),
            ("questions, new pictures", clients, questions(count, seed + 1, returning=False)),
        ]
    return questions(8, WARM_UP_SEED, returning=True), measured


def results_table(rows: list[dict[str, Any]]) -> Table:
    """Create a table with one row per server, trace and number of clients."""
    table = Table(
        "trace",
        "clients",
        "server",
        "TTFT p50, ms",
        "p95",
        "p99",
        "requests/s",
        "tokens/s",
        "cached",
        "wrong",
        "failed",
    )
    for row in sorted(rows, key=lambda row: (row["trace"], row["clients"])):
        times = row["ttft_ms"]
        table.add_row(
            row["trace"],
            str(row["clients"]),
            row["system"],
            *(f"{times[share]:,.0f}" for share in ("50", "95", "99")),
            f"{row['requests_per_s']:.2f}",
            f"{row['tokens_per_s']:.1f}",
            "" if row["cached_share"] is None else f"{100 * row['cached_share']:.0f} %",
            "" if row["wrong"] is None else f"{row['wrong']} of {row['requests']}",
            str(row["failed"]),
        )
    return table


if __name__ == "__main__":
    typer.run(main)
