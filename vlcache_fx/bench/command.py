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

from vlcache_fx.bench.presets import ModelSpec, find_preset, read_spec
from vlcache_fx.bench.run import BenchResult, MeasuredPoint, Progress, run_bench
from vlcache_fx.bench.settings import Settings, require_packages
from vlcache_fx.bench.systems import Variant
from vlcache_fx.errors import OptionError
from vlcache_fx.integrations.transformers_output import without_bars


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
    spec: ModelSpec,
    output_dir: Path,
    *,
    compile_time: bool,
    console: Console | None = None,
    progress: Progress = lambda *_: None,
    **settings: Any,
) -> BenchResult:
    """Measure, print tables, write ``bench.json`` and ``bench.png``; return what the first one holds.

    Each point is printed and appended to ``points.jsonl`` when it is measured: an interrupted run keeps its
    points.

    Args:
        spec: the model.
        output_dir: created if it does not exist.
        compile_time: time compilation, at the model's depth unless ``compile_layers`` is given.
        console: for tables; None prints none.
        progress: see ``bench.run.Progress``.
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
    console = console or Console(quiet=True)

    def keep(measured: MeasuredPoint) -> None:
        from vlcache_fx.bench.report import time_table

        console.print(time_table(measured))
        with points.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(dataclasses.asdict(measured)) + "\n")

    with _quiet():
        result = run_bench(spec, asked, progress, keep)
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
    verbosity, dynamo = transformers_logging.get_verbosity(), logging.getLogger("torch._dynamo")
    level = dynamo.level
    transformers_logging.set_verbosity_error()
    dynamo.setLevel(logging.ERROR)
    try:
        with without_bars():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        dynamo.setLevel(level)
