"""The results as tables for people."""

from collections.abc import Sequence

from rich.panel import Panel
from rich.table import Table

from vlcache_fx.bench.answers import Asked, FamilyScore
from vlcache_fx.bench.machine import Machine
from vlcache_fx.bench.rounds import Summary
from vlcache_fx.bench.ttft import TtftResult

LABELS = {
    "eager": "unmodified, eager",
    "plain": "unmodified, torch.compile",
    "cold": "vlcache, new photo (cold)",
    "warm": "vlcache, photo seen before (warm)",
    "floor": "prefix hit: same rows, cache ready",
}
READINGS = {
    "plain / warm": "times faster than torch.compile when the photo was seen before",
    "eager / warm": "times faster than the eager model when the photo was seen before",
    "warm / floor": "times a prefix hit",
    "cold / plain": "times torch.compile when the photo is new",
}


def percent(part: float, whole: float = 1.0) -> str:
    """``part`` of ``whole`` in percent."""
    return f"{100 * part / whole:.0f} %"


def answers_table(scores: Sequence[FamilyScore]) -> Table:
    """Answers per family of questions."""
    table = Table(title="Answers about scanned digits", title_style="bold")
    table.add_column("question")
    for heading in (
        "new picture\nright",
        "reused (warm)\nright",
        "full recompute\nright",
        "reused = full\nsame answer",
        "recomputed\nshare",
        "encoder\nskipped",
        "picture\nmoved",
    ):
        table.add_column(heading, justify="right")
    for one in scores:
        table.add_row(
            one.family,
            f"{one.cold_right}/{one.cold}",
            f"{one.warm_right}/{one.warm}",
            f"{one.full_right}/{one.warm}",
            percent(one.agree, one.warm),
            f"{100 * one.fraction:.1f} %",
            f"{one.encoder_hits}/{one.warm}",
            f"{one.moved}/{one.warm}",
        )
    return table


def example_panel(asked: Sequence[Asked]) -> Panel:
    """One picture's first question and what was asked about it later."""
    parts = []
    for number, one in enumerate(asked):
        heading = "First, the picture is new" if number == 0 else "Then again, behind another prompt"
        found = "reused" if one.hit else "computed"
        places = ", ".join(map(str, one.starts))
        parts.append(
            f"[bold]{heading}[/bold]: {one.mode}, picture {found}, begins at token {places}"
            f" of {one.num_tokens}, {100 * one.token_layer_fraction:.1f} % of it recomputed\n"
            f"  system prompt  {one.system_prompt or '(none)'}\n"
            f"  question       {one.text}\n"
            f"  answer         {one.mode} [bold]{one.answer}[/bold], full recompute [bold]{one.full}[/bold],"
            f" right {one.right}"
        )
    return Panel("\n\n".join(parts), title="One example", title_align="left")


def ttft_table(result: TtftResult) -> Table:
    """Milliseconds per system."""
    shape = result.shape
    table = Table(
        title=f"Time to first token: {result.parameters / 1e6:.0f} M parameters ({shape.layers} layers),"
        f" {result.dtype}, {result.num_tokens} tokens, {result.vision_tokens} of them a photo",
        title_style="bold",
    )
    table.add_column("system")
    for heading in ("median", "lowest", "highest", "runs", "compile"):
        table.add_column(heading, justify="right")
    for name, seconds in result.seconds.items():
        summary = Summary.of(seconds)
        compiled = result.first_call_seconds.get(name)
        table.add_row(
            LABELS[name],
            *(f"{1e3 * value:,.0f} ms" for value in (summary.median, summary.low, summary.high)),
            str(len(seconds)),
            "" if compiled is None else f"{compiled:.1f} s",
        )
    return table


def ratio_table(result: TtftResult) -> Table:
    """Ratios within each round."""
    table = Table(title="Compared within each round", title_style="bold")
    table.add_column("ratio")
    for heading in ("median", "lowest", "highest"):
        table.add_column(heading, justify="right")
    table.add_column("which reads as")
    for name, ratio in result.ratios.items():
        values = (f"{value:.2f}" for value in (ratio.median, ratio.low, ratio.high))
        table.add_row(name, *values, READINGS[name])
    return table


def ttft_notes(result: TtftResult) -> str:
    """What the numbers are about, in words."""
    first, second = result.starts
    fraction = 100 * result.warm_report["token_layer_fraction"]
    return (
        f"The photo's encoder output is given to all systems. The photo began at token {first} when it was"
        f" new and at {second} when it came back. The warm run computed {result.floor_rows} of"
        f" {result.num_tokens} rows ({fraction:.1f} % of the photo's token-layers). The prefix hit computes"
        f" as many on a cache that holds all others. Cold logits differ from the unmodified model's by at"
        f" most {100 * result.cold_difference:.2f} % of the largest.\n"
    )


def machine_line(machine: Machine) -> str:
    """The machine in one line."""
    return (
        f"{machine.processor}, {machine.cores} cores, {machine.threads} threads, torch {machine.torch},"
        f" transformers {machine.transformers}"
    )
