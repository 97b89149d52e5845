"""Compares the predictions of two models for the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

from vlcache_fx.runtime.guards.shadow import kl_per_row

Z = 1.959964
"""Two-sided 95 % of the normal distribution."""


@dataclass(frozen=True)
class Comparison:
    """Comparison for one prompt.

    Attributes:
        kl: KL divergence of the next token, exact against reused, in nats; mean over the answer's tokens.
        agrees: whether both predict the same tokens.
        right: whether the predicted tokens are the answer.
    """

    kl: float
    agrees: bool
    right: bool


def compare(exact: Tensor, reused: Tensor, answers: Sequence[Tensor]) -> list[Comparison]:
    """Compare the logits of each prompt.

    Args:
        exact, reused: logits, float32 [prompts, positions, vocabulary]; the last positions are the answer's.
        answers: per prompt, ids int64 [tokens].
    """
    divergence = kl_per_row(exact.double(), reused.double())
    predicted, expected = reused.argmax(-1).cpu(), exact.argmax(-1).cpu()
    compared = []
    for index, answer in enumerate(answers):
        answered = slice(-len(answer), None)
        compared.append(
            Comparison(
                kl=float(divergence[index, answered].mean()),
                agrees=torch.equal(predicted[index, answered], expected[index, answered]),
                right=torch.equal(predicted[index, answered], answer),
            )
        )
    return compared


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def proportion(successes: Sequence[bool]) -> Interval:
    """Return the share of successes with the interval of Wilson (1927), which is valid near 0 and 1."""
    count, share = len(successes), fmean(successes)
    centre = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    spread = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return Interval(share, max(0.0, centre - spread), min(1.0, centre + spread))


def average(values: Sequence[float]) -> Interval:
    """Return the mean with the interval of the normal approximation, clamped at 0."""
    mean = fmean(values)
    spread = Z * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Interval(mean, max(0.0, mean - spread), mean + spread)


def difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Return the mean of ``first - second``, in pairs, with the interval of the normal approximation."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = fmean(differences)
    spread = Z * stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return Interval(mean, mean - spread, mean + spread)
