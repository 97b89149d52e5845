"""Draws one request and its times from what ``make demo`` wrote: ``python docs/figures/request.py``.

The strips are the two prompts of the demo: the photo when it was new, and when it came back after another
prompt. Lengths, reused tokens and times are those of ``demo.json``; nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

HERE = Path(__file__).parent
TEXT, COMPUTED, REUSED = "#8a8f98", "#e07b39", "#2f80c2"
SYSTEMS = {
    "plain": "torch.compile",
    "floor": "prefix hit, same rows",
    "cold": "vlcache_fx, photo is new",
    "warm": "vlcache_fx, photo comes back",
}


def pieces(point: dict[str, Any], *, warm: bool) -> list[tuple[str, int, str]]:
    """Kind, tokens and colour of each part of a prompt, in order.

    The default policy recomputes the earliest tokens of a reused span.
    """
    length = point["vision_tokens"]
    start = point["starts"][1 if warm else 0]
    after = point["num_tokens"] - start - length
    if not warm:
        return [("text", start, TEXT), ("computed", length, COMPUTED), ("text", after, TEXT)]
    report = point["warm"]["warm"]["report"]
    recomputed = report["rows_per_layer"][0] - (point["num_tokens"] - length)
    return [
        ("text", start, TEXT),
        ("recomputed", recomputed, COMPUTED),
        ("reused", length - recomputed, REUSED),
        ("text", after, TEXT),
    ]


def draw_strip(axes: Axes, title: str, parts: Sequence[tuple[str, int, str]]) -> None:
    """A prompt as a bar of its tokens."""
    at = 0
    total = sum(count for _, count, _ in parts)
    for _, count, colour in parts:
        axes.barh(0, count, left=at, color=colour, edgecolor="white", linewidth=1.2)
        if count > total / 10:
            axes.text(
                at + count / 2, 0, f"{count:,} tokens of the photo", ha="center", va="center", color="w"
            )
        at += count
    counts = ", ".join(f"{count:,} {name}" for name, count, _ in parts)
    axes.set_title(f"{title}: {counts}", loc="left", fontsize=10)
    axes.set_xlim(0, total)
    axes.set_ylim(-0.4, 0.4)
    axes.axis("off")


def draw_times(axes: Axes, seconds: dict[str, list[float]]) -> None:
    """Median times to first token; a line from the lowest to the highest."""
    colours = {"plain": TEXT, "floor": TEXT, "cold": COMPUTED, "warm": REUSED}
    for row, name in enumerate(SYSTEMS):
        times = [1e3 * value for value in seconds[name]]
        axes.barh(row, median(times), color=colours[name], height=0.62)
        axes.plot([min(times), max(times)], [row, row], color="#3c4048", linewidth=1)
        axes.text(max(times) + 40, row, f"{median(times):,.0f} ms", va="center")
    axes.set_yticks(range(len(SYSTEMS)), list(SYSTEMS.values()))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12e3 * max(max(values) for values in seconds.values()))
    axes.set_title("Time to first token (median; line: lowest to highest)", loc="left", fontsize=10)
    axes.set_xticks([])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def draw(record: dict[str, Any], output: Path) -> None:
    """Write the picture of ``record`` to ``output``."""
    bench = record["bench"]
    point, size, machine = bench["points"][0]["point"], bench["size"], bench["machine"]
    plt.rcParams.update({"font.size": 10, "svg.hashsalt": "vlcache_fx", "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(
        3, 1, figsize=(9.2, 4.6), height_ratios=[0.55, 0.55, 2.2], layout="constrained", facecolor="white"
    )
    draw_strip(axes[0], "First request: the photo is new", pieces(point, warm=False))
    draw_strip(axes[1], "Next request: another prompt, same photo", pieces(point, warm=True))
    draw_times(axes[2], {name: point["seconds"][name] for name in SYSTEMS})
    named = {"text": TEXT, "photo, computed": COMPUTED, "photo, reused": REUSED}
    handles = [Patch(color=colour, label=name) for name, colour in named.items()]
    axes[2].legend(handles=handles, loc="lower right", frameon=False)
    axes[2].set_xlabel(
        f"{size['parameters'] / 1e6:.0f} M parameters, {size['layers']} layers, {bench['dtype']}; "
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}",
        loc="right",
        fontsize=8.5,
        color="#3c4048",
    )
    figure.savefig(output, metadata={"Date": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, default=Path("demo.json"), help="what make demo wrote")
    parser.add_argument("--output", type=Path, default=HERE / "request.svg")
    options = parser.parse_args(arguments)
    draw(json.loads(options.record.read_text(encoding="utf-8")), options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
