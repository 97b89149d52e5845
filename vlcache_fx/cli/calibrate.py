"""``vlcache calibrate``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlcache_fx.cli.errors import readable_errors
from vlcache_fx.cli.output import (
    Json,
    check_output_file,
    examples,
    print_json,
    result_console,
    stdout_for_json,
)
from vlcache_fx.cli.progress import showing_progress
from vlcache_fx.cli.prompts import DATA, POSITIONS

if TYPE_CHECKING:
    from vlcache_fx.fidelity.calibrate import Calibration

EPILOG = examples(
    "vlcache calibrate reference --output profile.json",
    "vlcache calibrate path/to/model --data prompts.jsonl --contexts 4",
)


def calibrate(
    model: Annotated[
        str, typer.Argument(help="reference, photo, hybrid, smollm2, or a folder of a transformers model")
    ],
    data: Annotated[Path | None, DATA] = None,
    family: Annotated[list[str] | None, typer.Option(help="families of questions (default: all)")] = None,
    count: Annotated[int, typer.Option(help="questions per family")] = 30,
    batch: Annotated[int, typer.Option(help="prompts per call")] = 16,
    positions: Annotated[int | None, POSITIONS] = None,
    depth_share: Annotated[float, typer.Option(help="share of rows that stop at each depth")] = 0.05,
    contexts: Annotated[
        list[int] | None,
        typer.Option(min=2, help="numbers of contexts for which donors are measured as well"),
    ] = None,
    donor_rank: Annotated[
        list[int] | None, typer.Option(min=0, help="ranks to compare for them (default: 0 16)")
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the questions")] = 0,
    lowering: Annotated[str, typer.Option(help="inductor, eager")] = "eager",
    output: Annotated[Path, typer.Option(help="file for the profile")] = Path("profile.json"),
    as_json: Json = False,
) -> None:
    """Measure the worth of recomputing in each layer of a model; write the profile."""
    with readable_errors():
        with stdout_for_json(as_json):
            # deferred: importing torch takes a second
            from vlcache_fx.fidelity.calibrate import calibrate as measure
            from vlcache_fx.fidelity.models import load_cases, load_subject
            from vlcache_fx.options import Options

            check_output_file(output)
            # `vlcache fidelity` uses the split "test": the prompts must differ.
            most = max(contexts or (1,))
            cases = load_cases(
                model, data, tuple(family or ()), count, split="train", seed=seed, contexts=most
            )
            with showing_progress(f"loading {model}") as steps:
                subject = load_subject(model, positions, {"lowering": lowering, "strict": True})
                steps.begin("measuring with prompts", len(cases))
                found = measure(
                    subject,
                    cases,
                    batch=batch,
                    depth_share=depth_share,
                    contexts=contexts or (),
                    donor_ranks=[Options(donor_rank=rank).donor_rank for rank in donor_rank or (0, 16)],
                    after_batch=steps.advance,
                )
            output.parent.mkdir(parents=True, exist_ok=True)
            found.profile.save(output)
        if as_json:
            print_json(asdict(found.profile))
        else:
            _show(found, output)


def _show(found: Calibration, output: Path) -> None:
    from vlcache_fx.bench.machine import describe_machine, machine_line
    from vlcache_fx.fidelity import table

    console = result_console()
    console.print(table.calibration_table(found))
    if found.is_flat:
        console.print("Equal counts were no worse on held-out prompts: the profile treats all layers alike.")
    if found.by_donor:
        chosen, rank = found.donor
        console.print(
            f"Nearly the best donor: {chosen} contexts, rank {rank} "
            f"(options donor_contexts={chosen}, donor_rank={rank})."
        )
    console.print(f"{machine_line(describe_machine())}; wrote {output}", highlight=False)
