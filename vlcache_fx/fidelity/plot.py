"""Plots the error over the recomputed share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vlcache_fx.fidelity.run import ALL, Score

FLOOR = 1e-9
"""Lower bound of drawn divergences: the axis is logarithmic, and full recompute has none."""


def plot_scores(scores: Sequence[Score], title: str, machine: str, path: Path) -> None:
    """Write a PNG: KL and agreement over the recomputed share, one line per policy, with the Pareto front."""
    overall = [score for score in scores if score.family == ALL]
    none = [score for score in overall if score.policy == "none"]
    policies = dict.fromkeys(score.policy for score in overall if score.policy not in ("none", "full"))
    front = pareto(overall)
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for policy in policies:
        own = sorted(
            [score for score in overall if score.policy == policy] + none, key=lambda score: score.recomputed
        )
        shares = [100 * score.recomputed for score in own]
        kls = [max(FLOOR, score.kl.mean) for score in own]
        spread = [
            [max(0.0, kl - max(FLOOR, score.kl.low)) for kl, score in zip(kls, own, strict=True)],
            [max(0.0, score.kl.high - kl) for kl, score in zip(kls, own, strict=True)],
        ]
        left.errorbar(shares, kls, spread, marker="o", markersize=4, capsize=2, label=policy)
        right.plot(
            shares, [100 * score.agreement.mean for score in own], marker="o", markersize=4, label=policy
        )
    left.plot(
        [100 * score.recomputed for score in front],
        [max(FLOOR, score.kl.mean) for score in front],
        linestyle="none", marker="s", markersize=10, fillstyle="none", color="black", label="Pareto front",
    )  # fmt: skip
    left.set_yscale("log")
    left.set_ylabel("KL divergence from the unmodified model, nats per token (95 % interval)")
    right.set_ylabel("% of prompts with the same answer")
    for axes in (left, right):
        axes.set_xscale("symlog", linthresh=0.5)
        axes.set_xlabel("% of the reused token-layers that are recomputed")
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.suptitle(f"{title}: {overall[0].prompts:,} prompts")
    figure.supxlabel(machine, fontsize=8)
    figure.savefig(path, dpi=120)


def pareto(scores: Sequence[Score]) -> list[Score]:
    """Return the scores that no other score beats in both recomputed share and KL, by rising share."""
    front: list[Score] = []
    for score in sorted(scores, key=lambda score: (score.recomputed, score.kl.mean)):
        if not front or score.kl.mean < front[-1].kl.mean:
            front.append(score)
    return front
