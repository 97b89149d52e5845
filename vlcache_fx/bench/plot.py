"""The results as one picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlcache_fx.bench.answers import FamilyScore
from vlcache_fx.bench.rounds import Summary
from vlcache_fx.bench.ttft import TtftResult

GREY, DARK, BLUE, GREEN, PALE, INK = "#9aa0a6", "#5f6368", "#7baaf7", "#1e8e3e", "#dadce0", "#3c4043"
NAMES = {
    "eager": ("unmodified\neager", GREY),
    "plain": ("unmodified\ntorch.compile", DARK),
    "cold": ("vlcache\nnew photo", BLUE),
    "warm": ("vlcache\nseen before", GREEN),
    "floor": ("prefix hit\nsame rows,\ncache ready", PALE),
}


def plot_results(scores: Sequence[FamilyScore], result: TtftResult, machine: str, path: Path) -> None:
    """Write a PNG: answers on the left, time to first token on the right."""
    figure = Figure(figsize=(14, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_answers(left, scores)
    _plot_times(right, result)
    figure.supxlabel(f"{machine}, {result.dtype}", fontsize=8, color=DARK)
    figure.savefig(path, dpi=120)


def _plot_answers(axes: Axes, scores: Sequence[FamilyScore]) -> None:
    bars = {
        "new picture: right": ([s.cold_right / s.cold for s in scores], BLUE),
        "picture reused: right": ([s.warm_right / s.warm for s in scores], GREEN),
        "full recompute: right": ([s.full_right / s.warm for s in scores], DARK),
        "reused agrees with full recompute": ([s.agree / s.warm for s in scores], PALE),
    }
    width = 0.8 / len(bars)
    for number, (label, (shares, color)) in enumerate(bars.items()):
        places = [family + (number - (len(bars) - 1) / 2) * width for family in range(len(scores))]
        drawn = axes.bar(places, [100 * share for share in shares], width, label=label, color=color)
        axes.bar_label(drawn, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(scores)), [score.family for score in scores])
    axes.set_ylim(0, 118)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("% of the questions")
    fraction = sum(score.fraction for score in scores) / len(scores)
    axes.set_title(f"Answers about scanned digits\n{100 * fraction:.1f} % of a reused picture is recomputed")
    axes.legend(ncols=2, fontsize=8, loc="upper center", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_times(axes: Axes, result: TtftResult) -> None:
    summaries = [Summary.of(seconds) for seconds in result.seconds.values()]
    names = [NAMES[name] for name in result.seconds]
    medians = [1e3 * summary.median for summary in summaries]
    below = [1e3 * (summary.median - summary.low) for summary in summaries]
    above = [1e3 * (summary.high - summary.median) for summary in summaries]
    places = range(len(names))
    colors = [color for _, color in names]
    axes.bar(places, medians, 0.65, color=colors, yerr=[below, above], capsize=4, ecolor=INK)
    for place, summary in zip(places, summaries, strict=True):
        text = f"{1e3 * summary.median:,.0f} ms"
        top = (place, 1e3 * summary.high)
        axes.annotate(text, top, (0, 6), textcoords="offset points", ha="center", weight="bold")
    axes.set_yscale("log")
    axes.set_ylim(top=max(1e3 * summary.high for summary in summaries) * 2)
    axes.set_xticks(places, [name for name, _ in names])
    axes.set_ylabel("time to first token, ms (log scale; median, lowest to highest)")
    axes.set_title(
        f"Photo of {result.vision_tokens} tokens, {result.parameters / 1e6:.0f} M parameters:"
        f" {result.ratios['plain / warm'].median:.1f}x faster than torch.compile\nwhen it was seen before"
    )
    axes.spines[["top", "right"]].set_visible(False)
