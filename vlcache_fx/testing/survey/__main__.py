"""Try families out: ``python -m vlcache_fx.testing.survey --write docs/families.md``."""

from __future__ import annotations

import json
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from vlcache_fx.testing.survey.families import known_families
from vlcache_fx.testing.survey.outcome import Outcome, SurveyError, try_family
from vlcache_fx.testing.survey.table import NAMED, markdown, write_into


def main(
    families: Annotated[list[str] | None, typer.Argument(help="Model types; by default all.")] = None,
    write: Annotated[Path | None, typer.Option(help="Document in which to replace the table.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the outcomes.")] = None,
    resume: Annotated[bool, typer.Option(help="Keep the outcomes in --output, and try the others.")] = False,
    memory_gib: Annotated[int, typer.Option(help="Limit of the address space; larger models fail.")] = 12,
) -> None:
    """Build each family's smallest model and generate with and without reuse."""
    console, outcomes = Console(stderr=True), list[Outcome]()
    known = known_families()
    names = families or [*NAMED, *(name for name in known if name not in NAMED)]
    unknown = [name for name in names if name not in known]
    if unknown:
        console.print(f"error: unknown families {', '.join(unknown)}; valid are: {', '.join(known)}")
        raise typer.Exit(2)
    if resume and output is not None and output.exists():
        outcomes += [Outcome(**each) for each in json.loads(output.read_text("utf-8"))]
    done = {outcome.model_type for outcome in outcomes}
    with at_most(memory_gib):
        for name in track(
            [name for name in names if name not in done], "families", console=console, transient=True
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other libraries warn of their own defaults
                try:
                    outcomes.append(try_family(name))
                except SurveyError as error:
                    outcomes.append(Outcome(name, known[name], {"vlcache_fx.compile": "wrong"}, str(error)))
                except Exception as error:  # noqa: BLE001 - the survey continues after failures
                    detail = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                    outcomes.append(Outcome(name, known[name], {"vlcache_fx.compile": "failed"}, detail))
            if output is not None:  # after each: it takes an hour
                output.write_text(json.dumps([one.as_dict() for one in outcomes], indent=1) + "\n", "utf-8")
    table = markdown(outcomes)
    typer.echo(table)
    if write is not None:
        write_into(write, table)


@contextmanager
def at_most(memory_gib: int) -> Iterator[None]:
    """Limit this process's address space: a model that stays large must not fill the memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory_gib << 30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


if __name__ == "__main__":
    typer.run(main)
