"""The explanation on a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vlcache_fx.explaining.explained_call import ExplainedCall, SampleExplanation
from vlcache_fx.explaining.heat_map import blocks
from vlcache_fx.explaining.numbers import ago_text, bytes_text, ms_text, rank_text, short_key, tokens_text
from vlcache_fx.explaining.tokens import TokenClass, by_column

COLOURS = {
    TokenClass.TEXT: "blue",
    TokenClass.PREFIX: "cyan",
    TokenClass.REUSED: "green",
    TokenClass.PARTLY: "bright_red",
    TokenClass.RECOMPUTED: "red",
    TokenClass.COMPUTED: "yellow",
    TokenClass.PADDING: "bright_black",
    TokenClass.UNMODIFIED: "magenta",
}
LETTERS = dict(zip(TokenClass, "TP.+!C-U", strict=True))
"""A letter per class: terminals may lack colours."""

WIDTH = 80
MOST_SAMPLES = 4


def text(explanation: ExplainedCall) -> RenderableType:
    """Return the explanation for ``rich``."""
    return Group(*_parts(explanation))


def _parts(explanation: ExplainedCall) -> Iterator[RenderableType]:
    settings = ", ".join(f"{name} {value}" for name, value in explanation.settings.items())
    yield Text.assemble(("mode ", "bold"), (explanation.mode, "bold"), f"   {settings}" if settings else "")
    if explanation.report is not None and explanation.report.reason:
        yield Text(str(explanation.report.reason))
    for kind, number in explanation.counts.items():
        yield Text.assemble(
            (f" {LETTERS[kind]} ", f"{COLOURS[kind]} reverse"), f" {number:>7,}  {kind.label}"
        )
    for index, sample in enumerate(explanation.samples[:MOST_SAMPLES]):
        yield from _sample(sample, f"prompt {index}: " if len(explanation.samples) > 1 else "")
    if explanation.stages:
        yield Text(f"\nTime to the first token, one run with the lowering {explanation.lowering}", "bold")
        yield _stages(explanation)
        yield Text(explanation.predictions.note, "dim")
    if explanation.donors:
        yield Text("\nStore hits", "bold")
        yield _donors(explanation)
    if explanation.refusals:
        yield Text("\nNot reused, and why", "bold")
        for found in explanation.refusals:
            yield Text(f"{found.subject}: [{found.reason.value}] {found.text}")
            yield Text(f"  do: {found.advice}", "italic")
    for miss in explanation.misses:
        yield Text(f"  {miss}", "dim")
    yield Text("\nGraphs", "bold")
    for graph in explanation.graphs:
        yield Text(f"- {graph.summary()}")


def _sample(sample: SampleExplanation, head: str) -> Iterator[RenderableType]:
    if not sample.ranges:
        return
    columns = min(WIDTH, sample.num_tokens)
    yield Text(f"\n{head}tokens 0 to {sample.num_tokens - 1:,}", "bold")
    strip = Text()
    for run in by_column(sample.ranges, columns):
        strip.append(LETTERS[run.kind] * run.length, f"{COLOURS[run.kind]} reverse")
    yield strip
    if sample.rows:
        lines = blocks(sample.rows, sample.num_tokens, columns)
        yield Text(f"rows that each of the {len(sample.rows)} layers computes, layer 0 first", "dim")
        yield Text("\n".join(lines), "red")


def _stages(explanation: ExplainedCall) -> Table:
    table = Table.grid(padding=(0, 2))
    most = max(stage.ms for stage in explanation.stages) or 1.0
    for stage in explanation.stages:
        bar = Text("█" * max(1, round(30 * stage.ms / most)), "blue")
        table.add_row(stage.name, bar, Text(ms_text(stage.ms), justify="right"), Text(stage.text, "dim"))
    bounds = (("full, bound", explanation.predictions.full), ("this, bound", explanation.predictions.request))
    for name, bound in bounds:
        if bound is not None:
            bar = Text("█" * min(30, max(1, round(30 * bound.ms / most))), "cyan")
            table.add_row(
                name,
                bar,
                Text(ms_text(bound.ms), justify="right"),
                Text(f"limited by {bound.limited_by}", "dim"),
            )
    return table


def _donors(explanation: ExplainedCall) -> Table:
    table = Table("image", "donor", "tier", "contexts", "dtype", "rank", "bytes", "last used")
    for donor in explanation.donors:
        table.add_row(
            tokens_text(donor.start, donor.length),
            short_key(donor.key) + (" (exact prefix)" if donor.is_exact else ""),
            donor.tier,
            str(donor.contexts),
            ", ".join(donor.dtypes),
            rank_text(donor.rank),
            bytes_text(donor.nbytes),
            ago_text(donor.unused_s),
        )
    return table
