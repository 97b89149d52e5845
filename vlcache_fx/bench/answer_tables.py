"""Tables of the reference model's answers."""

from collections.abc import Sequence

from rich.panel import Panel
from rich.table import Table

from vlcache_fx.bench.answers import Asked, FamilyScore


def percent(part: float, whole: float = 1.0) -> str:
    """Format ``part`` of ``whole`` in percent."""
    return f"{100 * part / whole:.0f} %"


def answers_table(scores: Sequence[FamilyScore]) -> Table:
    """Create a table of answers per family of questions."""
    table = Table(title="Answers about scanned digits", title_style="bold")
    table.add_column("question")
    for heading in (
        "new picture\ncorrect",
        "reused (warm)\ncorrect",
        "full recompute\ncorrect",
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
    """Show the first question about a picture, and later questions about it."""
    parts = []
    for number, one in enumerate(asked):
        heading = "First question, new picture" if number == 0 else "Later question, after another prompt"
        found = "reused" if one.hit else "computed"
        positions = ", ".join(map(str, one.starts))
        parts.append(
            f"[bold]{heading}[/bold]: {one.mode}, picture {found}, starts at token {positions}"
            f" of {one.num_tokens}, {100 * one.token_layer_fraction:.1f} % of it recomputed\n"
            f"  system prompt  {one.system_prompt or '(none)'}\n"
            f"  question       {one.text}\n"
            f"  answer         {one.mode} [bold]{one.answer}[/bold], full recompute [bold]{one.full}[/bold],"
            f" correct {one.right}"
        )
    return Panel("\n\n".join(parts), title="One example", title_align="left")
