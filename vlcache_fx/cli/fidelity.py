"""``vlcache fidelity``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlcache_fx.cli.errors import readable_errors
from vlcache_fx.cli.output import (
    Json,
    check_output_folder,
    examples,
    print_json,
    result_console,
    stdout_for_json,
)
from vlcache_fx.cli.progress import showing_progress
from vlcache_fx.cli.prompts import DATA, POSITIONS
from vlcache_fx.errors import OptionError

if TYPE_CHECKING:
    from vlcache_fx.fidelity.run import Score

EPILOG = examples(
    "vlcache fidelity reference --count 30 --budget 0.02 --budget 0.1",
    "vlcache fidelity path/to/model --data prompts.jsonl --json",
)

POLICIES = ("layer_aware", "uniform", "first_k", "cacheblend", "random")


def fidelity(
    model: Annotated[
        str, typer.Argument(help="reference, photo, hybrid, smollm2, or a folder of a transformers model")
    ],
    data: Annotated[Path | None, DATA] = None,
    family: Annotated[list[str] | None, typer.Option(help="families of questions (default: all)")] = None,
    count: Annotated[int, typer.Option(help="questions per family")] = 100,
    policy: Annotated[
        list[str] | None, typer.Option(help="policies, see vlcache policies (default: all with a budget)")
    ] = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="shares of token-layers to recompute (default: 0 0.01 0.02 0.05 0.1 0.2 1)"),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="profile of this model, from vlcache calibrate")
    ] = None,
    donor_dtype: Annotated[
        list[str] | None, typer.Option(help="how donors are stored: model, int8, float8 (default: model)")
    ] = None,
    contexts: Annotated[
        list[int] | None, typer.Option(min=1, help="prompts in which donors are recorded (default: 1)")
    ] = None,
    donor_rank: Annotated[
        list[int] | None,
        typer.Option(min=0, help="ranks of the differences between contexts; 0: their mean (default: 0)"),
    ] = None,
    batch: Annotated[int, typer.Option(help="prompts per call")] = 16,
    positions: Annotated[int | None, POSITIONS] = None,
    seed: Annotated[int, typer.Option(help="seed of the questions")] = 0,
    lowering: Annotated[str, typer.Option(help="inductor, eager")] = "eager",
    output_dir: Annotated[Path, typer.Option(help="folder for fidelity.json, .md and .png")] = Path(
        "fidelity-output"
    ),
    as_json: Json = False,
) -> None:
    """Measure accuracy, agreement and divergence of policies and budgets against the unmodified model."""
    with readable_errors():
        with stdout_for_json(as_json):
            # deferred: importing torch takes a second
            from vlcache_fx.fidelity.models import load_cases, load_subject
            from vlcache_fx.fidelity.run import BUDGETS, run, settings
            from vlcache_fx.options import Options
            from vlcache_fx.policies import Profile, get_policy

            budgets = budget or BUDGETS
            bad = [share for share in budgets if not 0 <= share <= 1]
            if bad:
                raise OptionError(f"budget={bad[0]} is not valid: it must be in [0, 1]")
            compared = settings(
                [get_policy(name) for name in policy or POLICIES],
                sorted(set(budgets)),
                None if profile is None else Profile.load(profile),
                tuple(Options(donor_dtype=dtype).donor_dtype for dtype in donor_dtype or ("model",)),
                contexts or (1,),
                tuple(Options(donor_rank=rank).donor_rank for rank in donor_rank or (0,)),
            )
            most = max(setting.contexts for setting in compared)
            cases = load_cases(
                model, data, tuple(family or ()), count, split="test", seed=seed, contexts=most
            )
            check_output_folder(output_dir)
            with showing_progress(f"loading {model}") as steps:
                subject = load_subject(model, positions, {"lowering": lowering, "strict": True})
                steps.begin("asking prompts", len(cases))
                scores = run(subject, cases, compared, batch=batch, after_batch=steps.advance)
            record = _write(scores, model, seed, output_dir)
        if as_json:
            print_json(record)
        else:
            _show(scores, model, budgets, record["machine"], output_dir)


def _write(scores: list[Score], model: str, seed: int, output_dir: Path) -> dict[str, Any]:
    """Write ``fidelity.json``, ``.md`` and ``.png``; return what the first one holds."""
    from vlcache_fx.bench.machine import describe_machine, machine_line
    from vlcache_fx.fidelity import table
    from vlcache_fx.fidelity.plot import plot_scores

    machine = machine_line(describe_machine())
    output_dir.mkdir(parents=True, exist_ok=True)
    record = {"model": model, "machine": machine, "seed": seed, "scores": [asdict(score) for score in scores]}
    (output_dir / "fidelity.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (output_dir / "fidelity.md").write_text(table.markdown(scores), encoding="utf-8")
    plot_scores(scores, model, machine, output_dir / "fidelity.png")
    return record


def _show(scores: list[Score], model: str, budgets: Sequence[float], machine: str, output_dir: Path) -> None:
    from vlcache_fx.fidelity import table

    console = result_console()
    console.print(table.overall_table(scores, model))
    shown = 0.02 if 0.02 in budgets else min(budgets, key=lambda budget: abs(budget - 0.02))
    console.print(table.family_table(scores, shown, model))
    console.print(machine, highlight=False)
    console.print(f"wrote fidelity.json, .md and .png to {output_dir}")
