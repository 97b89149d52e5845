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
    for score in scores:
        table.add_row(
            score.family,
            f"{score.cold_right}/{score.cold}",
            f"{score.warm_right}/{score.warm}",
            f"{score.full_right}/{score.warm}",
            percent(score.agree, score.warm),
            f"{100 * score.fraction:.1f} %",
            f"{score.encoder_hits}/{score.warm}",
            f"{score.moved}/{score.warm}",
        )
    return table


def example_panel(asked: Sequence[Asked]) -> Panel:
    """Show the first question about a picture, and later questions about it."""
    parts = []
    for number, question in enumerate(asked):
        heading = "First question, new picture" if number == 0 else "Later question, after another prompt"
        found = "reused" if question.hit else "computed"
        positions = ", ".join(map(str, question.starts))
        parts.append(
            f"[bold]{heading}[/bold]: {question.mode}, picture {found}, starts at token {positions}"
            f" of {question.num_tokens}, {100 * question.token_layer_fraction:.1f} % of it recomputed\n"
            f"  system prompt  {question.system_prompt or '(none)'}\n"
            f"  question       {question.text}\n"
            f"  answer         {question.mode} [bold]{question.answer}[/bold],"
            f" full recompute [bold]{question.full}[/bold], correct {question.right}"
        )
    return Panel("\n\n".join(parts), title="One example", title_align="left")
