"""Effects of reuse on answers and on time to first token. Run it: ``make demo``.

Asks the reference model about scanned digits, and times a larger decoder with random weights on a photo.
Prints tables, and writes ``demo.png`` and ``demo.json``.
"""

import argparse
import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging as transformers_logging

from vlcache_fx.bench.answer_tables import answers_table, example_panel
from vlcache_fx.bench.answers import RETURNS, AnswerBench, run_answers, score
from vlcache_fx.bench.figure import plot_demo
from vlcache_fx.bench.presets import find_preset
from vlcache_fx.bench.report import describe_warm, headline, ratio_table, time_table
from vlcache_fx.bench.rounds import MeasurementError
from vlcache_fx.bench.run import run_bench
from vlcache_fx.bench.settings import Settings
from vlcache_fx.testing.reference_vlm import FAMILIES

CPU = Settings(vision_tokens=(2668,), eager_rounds=2, encoder=False, store_entries=())
TINY = Settings(
    vision_tokens=(120,), rounds=2, eager_rounds=1, lowering="eager", encoder=False, store_entries=()
)
"""Runs in seconds; its times are not meaningful."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path(), help="folder for demo.png and demo.json")
    parser.add_argument("--questions", type=int, default=10, help="sets of pictures per family")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--rounds", type=int, help="timing rounds")
    parser.add_argument("--tiny", action="store_true", help="time a toy decoder, to test the demo")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo with command-line ``arguments``."""
    options = parse(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    spec, settings = find_preset("cpu"), CPU
    if options.tiny:
        spec, settings = find_preset("tiny"), TINY
    if options.rounds is not None:
        settings = dataclasses.replace(settings, rounds=options.rounds)
    console = Console(width=130) if not Console().is_terminal else Console()
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        asking = progress.add_task("asking about pictures", total=None)
        timing = progress.add_task("timing the first token", total=None)
        questions = len(options.families) * options.questions * (1 + len(RETURNS))
        progress.update(asking, total=questions)
        bench = AnswerBench(settings.variants[0].budget)
        results = run_answers(bench, options.families, options.questions, lambda: progress.advance(asking))
        del bench
        times = run_bench(
            spec,
            settings,
            lambda text, done, total: progress.update(timing, description=text, completed=done, total=total),
        )
    scores, point = score(results), times.points[0].point
    if "warm" not in point.warm:
        raise MeasurementError(f"the photo was not reused: {point.not_reused}")
    console.print(answers_table(scores))
    console.print("The compiled model ran with lowering 'eager', the unmodified model eagerly.\n")
    console.print(example_panel(results[0]))
    console.print(time_table(times.points[0]))
    console.print("All systems receive the photo's encoder output.", describe_warm(point), highlight=False)
    console.print(ratio_table(times))
    console.print(headline(times), highlight=False)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    plot_demo(scores, times, options.output_dir / "demo.png")
    record = {
        "scores": [dataclasses.asdict(family) for family in scores],
        "answers": [[dataclasses.asdict(question) for question in asked] for asked in results],
        "bench": dataclasses.asdict(times),
    }
    (options.output_dir / "demo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"wrote {options.output_dir / 'demo.png'} and {options.output_dir / 'demo.json'}")


if __name__ == "__main__":
    main()
