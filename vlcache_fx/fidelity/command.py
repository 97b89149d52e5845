"""What ``vlcache fidelity`` and ``vlcache calibrate`` do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlcache_fx.bench.machine import describe_machine, machine_line
from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity import table
from vlcache_fx.fidelity.calibrate import Calibration, calibrate
from vlcache_fx.fidelity.models import load_cases, load_subject
from vlcache_fx.fidelity.plot import plot_scores
from vlcache_fx.fidelity.run import Score, run, settings
from vlcache_fx.policies.profile import Profile
from vlcache_fx.policies.registry import get_policy

POLICIES = ("layer_aware", "uniform", "first_k", "cacheblend", "random")


def fidelity(
    model: str,
    *,
    data: Path | None,
    families: Sequence[str],
    count: int,
    policies: Sequence[str],
    budgets: Sequence[float],
    profile: Path | None,
    batch: int,
    positions: int,
    seed: int,
    output_dir: Path,
    options: Mapping[str, Any],
) -> list[Score]:
    """Compare policies and budgets; print tables, write ``fidelity.json``, ``.md`` and ``.png``.

    Raises:
        VlcacheError: see ``run``; and for what the arguments name.
    """
    bad = [budget for budget in budgets if not 0 <= budget <= 1]
    if bad:
        raise OptionError(f"a budget must be a share in [0, 1], not {bad[0]}")
    compared = settings(
        [get_policy(name) for name in policies or POLICIES],
        sorted(set(budgets)),
        None if profile is None else Profile.load(profile),
    )
    cases = load_cases(model, data, tuple(families), count, split="test", seed=seed)
    subject = load_subject(model, positions, options)
    console = _console()
    with _progress(console, "asking", len(cases)) as advance:
        scores = run(subject, cases, compared, batch=batch, after_batch=advance)
    console.print(table.overall_table(scores, model))
    shown = 0.02 if 0.02 in budgets else min(budgets, key=lambda budget: abs(budget - 0.02))
    console.print(table.family_table(scores, shown, model))
    machine = machine_line(describe_machine())
    console.print(machine, highlight=False)
    output_dir.mkdir(parents=True, exist_ok=True)
    record = {"model": model, "machine": machine, "seed": seed, "scores": [asdict(score) for score in scores]}
    (output_dir / "fidelity.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (output_dir / "fidelity.md").write_text(table.markdown(scores), encoding="utf-8")
    plot_scores(scores, model, machine, output_dir / "fidelity.png")
    console.print(f"wrote fidelity.json, .md and .png to {output_dir}")
    return scores


def calibration(
    model: str,
    *,
    data: Path | None,
    families: Sequence[str],
    count: int,
    batch: int,
    positions: int,
    depth_share: float,
    seed: int,
    output: Path,
    options: Mapping[str, Any],
) -> Calibration:
    """Measure a profile; print what was measured, write the profile.

    Raises:
        VlcacheError: see ``calibrate``; and for what the arguments name.
    """
    # Not the prompts that fidelity is measured on: those are of the split "test".
    cases = load_cases(model, data, tuple(families), count, split="train", seed=seed)
    subject = load_subject(model, positions, options)
    console = _console()
    with _progress(console, "calibrating", len(cases)) as advance:
        found = calibrate(subject, cases, batch=batch, depth_share=depth_share, after_batch=advance)
    console.print(table.calibration_table(found))
    if found.is_flat:
        console.print(
            "On held-out prompts equal counts were no worse: the profile says that all layers are equal."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    found.profile.save(output)
    console.print(f"{machine_line(describe_machine())}; wrote {output}", highlight=False)
    return found


def _console() -> Console:
    return Console() if Console().is_terminal else Console(width=120)


@contextmanager
def _progress(console: Console, what: str, total: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)
