"""Figures: time to first token over vision tokens, or at one point next to answers."""

import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlcache_fx.bench.answers import FamilyScore
from vlcache_fx.bench.machine import machine_line
from vlcache_fx.bench.report import system_name
from vlcache_fx.bench.rounds import Summary
from vlcache_fx.bench.run import BenchResult, MeasuredPoint

COLORS = {
    "eager": "#9aa0a6",
    "plain": "#3c4043",
    "cold": "#7baaf7",
    "not reused": "#d93025",
    "floor": "#a142f4",
}
WARM_COLORS = ("#1e8e3e", "#e37400", "#00838f", "#c2185b", "#795548", "#5c6bc0")


def plot_bench(result: BenchResult, path: Path) -> None:
    """Write a PNG: one log-log panel per number of images and batch size."""
    panels: dict[tuple[int, int], list[MeasuredPoint]] = {}
    for measured in result.points:
        shape = measured.point.shape
        panels.setdefault((shape.images, shape.batch), []).append(measured)
    figure = Figure(figsize=(2 + 6 * len(panels), 6.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for panel, ((images, batch), points) in zip(axes, panels.items(), strict=True):
        _plot_panel(panel, sorted(points, key=lambda measured: measured.point.vision_tokens))
        panel.set_title(f"{images} image{'s' * (images > 1)}, batch {batch}")
    axes[0].set_ylabel("time to first token, ms (median, lowest to highest)")
    figure.suptitle(
        f"{result.model}, {result.size.layers} layers, {result.dtype}, {result.settings.lowering}"
    )
    machine = result.machine
    where = machine.processor if result.device == "CPU" else result.device
    figure.supxlabel(f"{where}, {machine.threads} threads, torch {machine.torch}", fontsize=8)
    figure.savefig(path, dpi=120)


def _plot_panel(axes: Axes, points: Sequence[MeasuredPoint]) -> None:
    names = dict.fromkeys(name for measured in points for name in measured.point.seconds)
    warm_colors = cycle(WARM_COLORS)
    for name in names:
        color = COLORS.get(name) or (next(warm_colors) if name.startswith("warm") else COLORS["floor"])
        _plot_system(axes, points, name, color)
        _plot_bound(axes, points, name, color)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    tokens = [measured.point.vision_tokens for measured in points]
    axes.set_xticks(tokens, [f"{number:,}" for number in tokens])
    axes.minorticks_off()
    axes.set_xlabel("vision tokens per sample")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def _plot_system(axes: Axes, points: Sequence[MeasuredPoint], name: str, color: str) -> None:
    found = [
        (measured.point.vision_tokens, Summary.of(measured.point.seconds[name]))
        for measured in points
        if measured.point.seconds.get(name)
    ]
    if not found:
        return
    medians = [1e3 * summary.median for _, summary in found]
    below = [1e3 * (summary.median - summary.low) for _, summary in found]
    above = [1e3 * (summary.high - summary.median) for _, summary in found]
    tokens = [number for number, _ in found]
    axes.errorbar(
        tokens, medians, [below, above], marker="o", capsize=3, color=color, label=system_name(name)
    )


def _plot_bound(axes: Axes, points: Sequence[MeasuredPoint], name: str, color: str) -> None:
    found = [(measured.point.vision_tokens, measured.bounds.get(name)) for measured in points]
    known = [(tokens, 1e3 * bound.seconds) for tokens, bound in found if bound is not None]
    if known:
        label = f"roofline: {system_name(name)}"
        axes.plot(*zip(*known, strict=True), ":", marker="_", color=color, label=label)


def plot_demo(scores: Sequence[FamilyScore], result: BenchResult, path: Path) -> None:
    """Write a PNG: answers on the left, times to first token of the first point on the right."""
    figure = Figure(figsize=(14, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_answers(left, scores)
    _plot_times(right, result)
    figure.supxlabel(f"{machine_line(result.machine)}, {result.dtype}", fontsize=8)
    figure.savefig(path, dpi=120)


def _plot_answers(axes: Axes, scores: Sequence[FamilyScore]) -> None:
    bars = {
        "new picture: correct": ([s.cold_right / s.cold for s in scores], COLORS["cold"]),
        "picture reused: correct": ([s.warm_right / s.warm for s in scores], WARM_COLORS[0]),
        "full recompute: correct": ([s.full_right / s.warm for s in scores], COLORS["plain"]),
        "reused agrees with full recompute": ([s.agree / s.warm for s in scores], COLORS["eager"]),
    }
    width = 0.8 / len(bars)
    for number, (label, (shares, color)) in enumerate(bars.items()):
        centers = [family + (number - (len(bars) - 1) / 2) * width for family in range(len(scores))]
        drawn = axes.bar(centers, [100 * share for share in shares], width, label=label, color=color)
        axes.bar_label(drawn, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(scores)), [score.family for score in scores])
    axes.set_ylim(0, 118)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("% of the questions")
    fraction = sum(score.fraction for score in scores) / len(scores)
    axes.set_title(f"Answers about scanned digits\n{100 * fraction:.1f} % of a reused picture is recomputed")
    axes.legend(ncols=2, fontsize=8, loc="upper center", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_times(axes: Axes, result: BenchResult) -> None:
    point = result.points[0].point
    timed = {name: Summary.of(seconds) for name, seconds in point.seconds.items() if seconds}
    colors = [COLORS.get(name, WARM_COLORS[0]) for name in timed]
    medians = [1e3 * summary.median for summary in timed.values()]
    below = [1e3 * (summary.median - summary.low) for summary in timed.values()]
    above = [1e3 * (summary.high - summary.median) for summary in timed.values()]
    axes.bar(range(len(timed)), medians, 0.65, color=colors, yerr=[below, above], capsize=4)
    for index, seconds in enumerate(timed.values()):
        top = (index, 1e3 * seconds.high)
        text = f"{1e3 * seconds.median:,.0f} ms"
        axes.annotate(text, top, (0, 6), textcoords="offset points", ha="center", weight="bold")
    axes.set_yscale("log")
    axes.set_ylim(top=max(1e3 * summary.high for summary in timed.values()) * 2)
    labels = [re.sub(r"[,:] | (?=\()", "\n", system_name(name)) for name in timed]
    axes.set_xticks(range(len(timed)), labels, fontsize=9)
    axes.set_ylabel("time to first token, ms (log scale; median, lowest to highest)")
    faster = point.ratios["plain / warm"].median
    axes.set_title(
        f"Photo of {point.vision_tokens} tokens, {result.size.parameters / 1e6:.0f} M parameters:"
        f" {faster:.1f}x faster than torch.compile\nwhen it recurs"
    )
    axes.spines[["top", "right"]].set_visible(False)
