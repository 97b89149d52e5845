"""``vlcache warm-up``."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from vlcache_fx.cli.errors import readable_errors
from vlcache_fx.cli.output import Json, check_output_folder, examples, print_json, stdout_for_json
from vlcache_fx.cli.progress import showing_progress

EPILOG = examples(
    "vlcache warm-up reference --output artifacts/",
    "vlcache serve reference --artifacts artifacts/",
)


def warm_up(
    model: Annotated[
        list[str],
        typer.Argument(help="reference, photo, hybrid, a folder of a transformers model, or NAME=FOLDER"),
    ],
    output: Annotated[Path, typer.Option(help="new folder for the programs")],
    budget: Annotated[float | None, typer.Option(help="as for vlcache serve")] = None,
    policy: Annotated[str | None, typer.Option(help="as for vlcache serve")] = None,
    profile: Annotated[Path | None, typer.Option(help="as for vlcache serve")] = None,
    donor_rank: Annotated[int | None, typer.Option(help="as for vlcache serve")] = None,
    device: Annotated[str, typer.Option(help="device of the models")] = "auto",
    dtype: Annotated[str, typer.Option(help="dtype of models from folders")] = "auto",
    batch_size: Annotated[int, typer.Option(help="as for vlcache serve")] = 8,
    as_json: Json = False,
) -> None:
    """Compile a model's programs ahead of time: vlcache serve MODEL --artifacts FOLDER compiles none."""
    with readable_errors():
        begin_s = time.perf_counter()
        with stdout_for_json(as_json):
            # deferred: importing torch takes a second
            from vlcache_fx.serve.extra import require_serve

            require_serve()
            check_output_folder(output)
            from vlcache_fx.integrations.transformers_output import without_bars
            from vlcache_fx.serve.options import ServeOptions
            from vlcache_fx.serve.warm_up import warm_up

            engine = {"budget": budget, "policy": policy, "profile": profile, "donor_rank": donor_rank}
            options = ServeOptions(
                models=tuple(model),
                engine={name: value for name, value in engine.items() if value is not None},
                device=device,
                dtype=dtype,
                batch_size=batch_size,
            )
            with showing_progress(f"loading and compiling {', '.join(model)}"), without_bars():
                manifest = warm_up(options, output)
        nbytes = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        seconds = time.perf_counter() - begin_s
        if as_json:
            found = {"output": str(output), "nbytes": nbytes, "seconds": round(seconds, 3)}
            print_json({**asdict(manifest), **found})
        else:
            typer.echo(
                f"{manifest.num_programs} programs for {', '.join(manifest.models)} are in {output} "
                f"({nbytes / 2**20:.1f} MiB, {seconds:.1f} s)"
            )
