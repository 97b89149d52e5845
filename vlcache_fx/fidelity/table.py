"""Tables of scores and calibrations."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from vlcache_fx.fidelity.calibrate import DONOR_SHARE, Calibration
from vlcache_fx.fidelity.compare import Interval
from vlcache_fx.fidelity.run import ALL, Score

_COLUMNS = ("recomputed", "correct", "agreement", "KL (nats)")


def overall_table(scores: Sequence[Score], title: str) -> Table:
    """Create a table with one row per policy and budget, over all families."""
    overall = [score for score in scores if score.family == ALL]
    exact = overall[0].exact_accuracy
    table = _table(
        f"{title}: {overall[0].prompts} prompts; unmodified model correct: {percent(exact)}",
        ("policy", "budget"),
    )
    for score in overall:
        table.add_row(score.policy, f"{100 * score.budget:g} %", *_cells(score))
    return table


def family_table(scores: Sequence[Score], budget: float, title: str) -> Table:
    """Create a table with one row per family and policy, at one budget."""
    table = _table(
        f"{title}: {100 * budget:g} % budget", ("family", "prompts", "policy", "unmodified correct")
    )
    chosen = [score for score in scores if score.budget == budget and score.family != ALL]
    for score in sorted(chosen, key=lambda score: score.family):
        exact = percent(score.exact_accuracy)
        table.add_row(score.family, f"{score.prompts:,}", score.policy, exact, *_cells(score))
    return table


def calibration_table(calibration: Calibration) -> Table:
    """Create a table of the measurements, in order."""
    table = Table("recomputed", "layers", "KL (nats)", title="Error by recomputed rows", title_style="bold")
    layers = len(calibration.profile.sensitivities)
    for share, error in calibration.profile.error_curve:
        table.add_row(f"{100 * share:g} %", f"all {layers}", f"{error:.3g}")
    for depth, error in calibration.by_depth:
        table.add_row(f"{100 * calibration.depth_share:g} %", f"first {depth}", f"{error:.3g}")
    for budget, equal, solved in calibration.checked:
        table.add_row(f"{100 * budget:g} %", "held out: equal counts", f"{equal:.3g}")
        table.add_row(f"{100 * budget:g} %", "held out: by sensitivity", f"{solved:.3g}")
    for count, rank, error in calibration.by_donor:
        name = "donors of one context" if count == 1 else f"donors of {count} contexts, rank {rank}"
        table.add_row(f"{100 * DONOR_SHARE:g} %", name, f"{error:.3g}")
    return table


def markdown(scores: Sequence[Score]) -> str:
    """Format all scores in Markdown: over all families, then per family."""
    ordered = [score for score in scores if score.family == ALL]
    ordered += sorted((score for score in scores if score.family != ALL), key=lambda score: score.family)
    lines = [
        "| family | prompts | policy | budget | recomputed | unmodified correct | correct | agreement | KL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for score in ordered:
        cells = (score.family, f"{score.prompts:,}", score.policy, f"{100 * score.budget:g} %")
        share, *measured = _cells(score)
        lines.append(f"| {' | '.join([*cells, share, percent(score.exact_accuracy), *measured])} |")
    return "\n".join(lines) + "\n"


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_style="bold")
    for heading in headings:
        table.add_column(heading)
    for heading in _COLUMNS:
        table.add_column(heading, justify="right")
    return table


def _cells(score: Score) -> tuple[str, ...]:
    share = f"{100 * score.recomputed:.1f} %"
    return share, percent(score.accuracy), percent(score.agreement), nats(score.kl)


def nats(interval: Interval) -> str:
    """Format a mean divergence and its interval."""
    return f"{interval.mean:.2g} ({interval.low:.2g} to {interval.high:.2g})"


def percent(interval: Interval) -> str:
    """Format a share and its interval."""
    return f"{100 * interval.mean:.1f} % ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
