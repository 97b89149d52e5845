"""Implementation of ``vlcache bench``: choose a model, measure, print tables, write files."""

import dataclasses
import itertools
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vlcache_fx.bench.presets import ModelSpec, find_preset, read_spec
from vlcache_fx.bench.run import BenchResult, MeasuredPoint, run_bench
from vlcache_fx.bench.settings import Settings, require_packages
from vlcache_fx.bench.systems import Variant
from vlcache_fx.errors import OptionError

WIDTH = 10_000
"""Characters per line of output to files and pipes: no column of a table is cut."""


def choose_model(preset: str, config: Path | None, model_class: str | None, layers: int | None) -> ModelSpec:
    """Return the preset's model, or the configuration's if given.

    Raises:
        OptionError: no such preset, or an unusable configuration.
    """
    if config is not None:
        return read_spec(config, model_class).with_layers(layers)
    if model_class is not None:
        raise OptionError(f"model_class={model_class!r} needs config: presets have their own class")
    return find_preset(preset).with_layers(layers)


def combine(
    policies: Sequence[str] | None,
    budgets: Sequence[float] | None,
    stores: Sequence[str] | None,
    donor_dtypes: Sequence[str] | None = None,
) -> tuple[Variant, ...]:
    """Return every combination; a missing list means its default."""
    default = Variant()
    lists = (
        policies or [default.policy],
        budgets or [default.budget],
        stores or [default.store],
        donor_dtypes or [default.donor_dtype],
    )
    return tuple(dict.fromkeys(itertools.starmap(Variant, itertools.product(*lists))))


def bench(
    spec: ModelSpec, output_dir: Path, *, compile_time: bool, prints: bool = True, **settings: Any
) -> BenchResult:
    """Measure, print tables, write ``bench.json`` and ``bench.png``; return what the first one holds.

    Each point is printed and appended to ``points.jsonl`` when it is measured: an interrupted run keeps its
    points.

    Args:
        spec: the model.
        output_dir: created if it does not exist.
        compile_time: time compilation, at the model's depth unless ``compile_layers`` is given.
        prints: print tables to stdout. Progress goes to stderr, unless stdout is a terminal.
        **settings: see ``Settings``.

    Raises:
        OptionError, PolicyError: a setting is not valid.
        MeasurementError: a run had another mode than expected.
    """
    require_packages()
    if not compile_time:
        settings["compile_layers"] = ()
    elif "compile_layers" not in settings:
        text = spec.config.get("text_config", spec.config)
        settings["compile_layers"] = (text["num_hidden_layers"],) if "num_hidden_layers" in text else ()
    asked = Settings(**settings)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise OptionError(f"output_dir={str(output_dir)!r} cannot be written to: {error}") from error
    points = output_dir / "points.jsonl"
    points.unlink(missing_ok=True)
    console = Console(width=None if Console().is_terminal else WIDTH, quiet=not prints)
    shown = console if prints and console.is_terminal else Console(stderr=True)
    columns = (TextColumn("{task.description:<56}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with _quiet(), Progress(*columns, TimeElapsedColumn(), console=shown) as progress:
        task = progress.add_task("", total=None)

        def show(description: str, done: int, total: int) -> None:
            progress.update(task, description=description, completed=done, total=total)

        def keep(measured: MeasuredPoint) -> None:
            from vlcache_fx.bench.report import time_table

            console.print(time_table(measured))
            with points.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(dataclasses.asdict(measured)) + "\n")

        result = run_bench(spec, asked, show, keep)
    _print(result, console)
    _write(result, output_dir, console)
    return result


def _print(result: BenchResult, console: Console) -> None:
    from vlcache_fx.bench.report import headline, tables

    console.print(headline(result), highlight=False)
    for table in tables(result):
        console.print(table)
    for note in result.notes:
        console.print(note, highlight=False)


def _write(result: BenchResult, output_dir: Path, console: Console) -> None:
    from vlcache_fx.bench.figure import plot_bench

    record, picture = output_dir / "bench.json", output_dir / "bench.png"
    record.write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n", encoding="utf-8")
    plot_bench(result, picture)
    console.print(f"wrote {record} and {picture}", highlight=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence logs and progress bars of libraries, which would break ours."""
    from transformers.utils import logging as untyped

    transformers_logging: Any = untyped
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "vlcache_fx")]
    levels = [logger.level for logger in loggers]
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
