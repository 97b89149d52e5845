"""What reuse does to the answers and to the time to first token. Run it: ``make demo``.

It asks the reference model about scanned digits, and times a larger decoder with random weights on a photo.
It prints tables and writes ``demo.png`` and ``demo.json``.
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

from vlcache_fx.bench import table
from vlcache_fx.bench.answers import RETURNS, AnswerBench, run_answers, score
from vlcache_fx.bench.machine import describe_machine
from vlcache_fx.bench.plot import plot_results
from vlcache_fx.bench.ttft import TINY, Shape, TtftBench
from vlcache_fx.testing.reference_vlm import FAMILIES


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path(), help="where demo.png and demo.json go")
    parser.add_argument("--questions", type=int, default=10, help="sets of pictures per family")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--rounds", type=int, help="rounds of timing")
    parser.add_argument("--tiny", action="store_true", help="time a toy decoder, to try the demo out")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo with command-line ``arguments``."""
    options = parse(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    shape = TINY if options.tiny else Shape()
    if options.rounds is not None:
        shape = dataclasses.replace(shape, rounds=options.rounds)
    console = Console(width=110) if not Console().is_terminal else Console()
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        asking = progress.add_task("asking about pictures", total=None)
        timing = progress.add_task("timing the first token", total=None)
        questions = len(options.families) * options.questions * (1 + len(RETURNS))
        progress.update(asking, total=questions)
        bench = AnswerBench(shape.budget)
        results = run_answers(bench, options.families, options.questions, lambda: progress.advance(asking))
        del bench
        progress.update(timing, description="compiling, then timing")
        ttft = TtftBench(shape)
        progress.update(timing, total=ttft.number_of_runs)
        times = ttft.run(lambda: progress.advance(timing))
    scores, machine = score(results), describe_machine()
    console.print(table.answers_table(scores))
    console.print("The compiled model ran with lowering 'eager' (it is tiny), the unmodified one eagerly.\n")
    console.print(table.example_panel(results[0]))
    console.print(table.ttft_table(times))
    console.print(table.ttft_notes(times), highlight=False)
    console.print(table.ratio_table(times))
    console.print(table.machine_line(machine), highlight=False)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    plot_results(scores, times, table.machine_line(machine), options.output_dir / "demo.png")
    record = {
        "machine": dataclasses.asdict(machine),
        "scores": [dataclasses.asdict(one) for one in scores],
        "answers": [[dataclasses.asdict(one) for one in asked] for asked in results],
        "ttft": dataclasses.asdict(times),
    }
    (options.output_dir / "demo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(f"wrote {options.output_dir / 'demo.png'} and {options.output_dir / 'demo.json'}")


if __name__ == "__main__":
    main()
