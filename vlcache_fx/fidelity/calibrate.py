"""Measures a model's profile: the worth of recomputing in each layer, and the error as a function of rows.

1. *Error curve.* The error (mean KL divergence from the unmodified model over the answers' tokens) for rising
   shares of a span's first rows, recomputed in all layers.
2. *Depth.* A share of the first rows is recomputed up to depth d, for several d. h(d) is the gain up to d as
   a share of the gain in all layers; it is made monotone (isotonic regression), and linear between measured
   depths. The sensitivity of layer l is h(l + 1) - h(l).
3. *Check.* Measured sensitivities are noisy. On held-out prompts and at several budgets, row counts from
   ``vlcache_fx.plan.allocate`` compete with equal counts; unless they are better, the profile is flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor

from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.prompts import Case
from vlcache_fx.fidelity.run import ALL, Setting, run
from vlcache_fx.fidelity.subject import Subject
from vlcache_fx.plan.allocate import pools
from vlcache_fx.policies.base import Policy, SpanContext
from vlcache_fx.policies.profile import Profile

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
CHECKED_BUDGETS = (0.01, 0.02, 0.05)
MAX_DEPTHS = 10

DONOR_SHARE = 0.02
"""Share of rows at which donors are compared: the default budget."""

NEARLY_BEST = 1.1
"""Largest error of a smaller donor that is chosen, as a multiple of the best one's."""


@dataclass(frozen=True)
class UpTo(Policy):
    """The first rows, in the first layers. For calibration.

    Attributes:
        share: share of a span's rows.
        depth: number of layers; None for all.
    """

    name: ClassVar[str] = "up_to"
    ignores_budget: ClassVar[bool] = True
    keeps_prefix: ClassVar[bool] = False

    share: float
    depth: int | None = None

    def select(self, span: SpanContext) -> Sequence[Tensor]:
        """See ``Policy.select``."""
        rows = torch.arange(math.ceil(self.share * span.length))
        depth = span.num_layers if self.depth is None else self.depth
        return (rows,) * depth + (rows[:0],) * (span.num_layers - depth)


@dataclass(frozen=True)
class Calibration:
    """A profile and its measurements.

    Attributes:
        profile: the result.
        by_depth: ``(depth, error)`` with ``depth_share`` of the rows recomputed up to ``depth``.
        depth_share: share of rows.
        checked: ``(budget, error of equal counts, error of solved counts)`` on held-out prompts.
        is_flat: whether the check rejected the sensitivities.
        prompts: numbers of prompts for measurements and check.
        by_donor: ``(contexts, rank, error)`` at ``DONOR_SHARE`` of the rows, by contexts, then by rank; the
            first is a donor of one context. Empty if only that was measured.
    """

    profile: Profile
    by_depth: tuple[tuple[int, float], ...]
    depth_share: float
    checked: tuple[tuple[float, float, float], ...]
    is_flat: bool
    prompts: tuple[int, int]
    by_donor: tuple[tuple[int, int, float], ...] = ()

    @property
    def donor(self) -> tuple[int, int]:
        """Contexts and rank to serve with: the fewest and smallest that are nearly the best."""
        least = min(error for _, _, error in self.by_donor)
        return next((count, rank) for count, rank, error in self.by_donor if error <= NEARLY_BEST * least)


def calibrate(
    subject: Subject,
    cases: Sequence[Case],
    *,
    batch: int = 16,
    depth_share: float = 0.05,
    contexts: Sequence[int] = (),
    donor_ranks: Sequence[int] = (0,),
    after_batch: Callable[[int], None] | None = None,
) -> Calibration:
    """Measure the profile of ``subject`` on ``cases``; every third case is held out for the check.

    Args:
        subject: the model.
        cases: prompts, with as many of each donor as the largest of ``contexts``.
        batch: prompts per call.
        depth_share: share of rows that stop at each depth.
        contexts: numbers of contexts, 2 or more, for which donors are measured as well.
        donor_ranks: values of the option ``donor_rank`` to compare for them.
        after_batch: called with the number of finished cases.

    Raises:
        OptionError: too few cases, or this model is not reused.
    """
    if len(cases) < 3:
        raise OptionError(f"calibration needs at least 3 cases, not {len(cases)}")
    if not 0 < depth_share < 1:
        raise OptionError(f"depth_share={depth_share!r} is not valid: it must be between 0 and 1")
    held_out = [case for index, case in enumerate(cases) if index % 3 == 2]
    measured = [case for index, case in enumerate(cases) if index % 3 != 2]
    subject.record(measured[:1])
    fingerprint, dtype, num_layers = _identity(subject)

    def errors(prompts: Sequence[Case], compared: Sequence[Setting]) -> list[float]:
        scores = run(subject, prompts, compared, batch=batch, after_batch=after_batch)
        return [score.kl.mean for score in scores if score.family == ALL]

    depths = depths_of(num_layers)
    by_share = [Setting(UpTo(share), 1.0) for share in SHARES]
    by_depth = [Setting(UpTo(depth_share, depth), 1.0) for depth in depths]
    found = errors(measured, [*by_share, *by_depth])
    depth_errors = found[len(SHARES) :]
    curve = [(0.0, depth_errors[0]), *zip(SHARES, found, strict=False), (1.0, 0.0)]
    profile = Profile(fingerprint, dtype, sensitivities(depths, depth_errors), falling(curve))
    trials = [
        Setting(policy, budget, profile)
        for budget in CHECKED_BUDGETS
        for policy in ("uniform", "layer_aware")
    ]
    tried = errors(held_out, trials)
    checked = tuple(zip(CHECKED_BUDGETS, tried[::2], tried[1::2], strict=True))
    is_flat = fmean(solved / equal if equal else 1.0 for _, equal, solved in checked) >= 1
    if is_flat:
        profile = replace(profile, sensitivities=(1.0,) * num_layers)
    points = tuple(zip(depths, depth_errors, strict=True))
    found_all = Calibration(profile, points, depth_share, checked, is_flat, (len(measured), len(held_out)))
    if not contexts:
        return found_all
    curves: dict[tuple[int, int], tuple[tuple[float, float], ...]] = {(1, 0): profile.error_curve}
    for count in sorted(set(contexts)):
        for rank in sorted(set(donor_ranks)):
            of_donor = [
                Setting(UpTo(share), 1.0, contexts=count, donor_rank=rank) for share in (0.0, *SHARES)
            ]
            shares = zip((0.0, *SHARES), errors(measured, of_donor), strict=True)
            curves[count, rank] = falling([*shares, (1.0, 0.0)])
    by_donor = tuple((*donor, dict(curve)[DONOR_SHARE]) for donor, curve in curves.items())
    found_all = replace(found_all, by_donor=by_donor)
    rank = found_all.donor[1]
    by_contexts = tuple((count, curve) for (count, own), curve in curves.items() if count > 1 and own == rank)
    return replace(found_all, profile=replace(profile, curves_by_contexts=by_contexts, donor_rank=rank))


def _identity(subject: Subject) -> tuple[str, str, int]:
    """Return fingerprint, dtype of keys and values, and number of layers."""
    report = subject.report
    entry = subject.engine.store.get(report["spans"][0]["key"])
    assert entry is not None
    dtype = str(next(iter(entry.tensors.values())).dtype).removeprefix("torch.")
    return report["model_fingerprint"], dtype, len(report["rows_per_layer"]) - 1


def depths_of(num_layers: int) -> list[int]:
    """Return depths from 0 to all layers in at most ``MAX_DEPTHS`` even steps."""
    steps = min(MAX_DEPTHS, num_layers)
    return [round(step * num_layers / steps) for step in range(steps + 1)]


def sensitivities(depths: Sequence[int], errors: Sequence[float]) -> tuple[float, ...]:
    """Compute the share of the gain in each layer.

    Args:
        depths: rising, from 0 to the number of layers.
        errors: error with rows recomputed up to each depth.
    """
    gained = errors[0] - errors[-1]
    if gained <= 0:
        return (1.0,) * depths[-1]
    shares = [min(1.0, max(0.0, (errors[0] - error) / gained)) for error in errors]
    rising = [-mean for mean, size in pools([-share for share in shares]) for _ in range(size)]
    steps = zip(pairwise(depths), pairwise(rising), strict=True)
    return tuple((up - low) / (end - start) for (start, end), (low, up) in steps for _ in range(end - start))


def falling(curve: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Return the closest curve that never rises: more rows cannot increase the error."""
    errors = [mean for mean, size in pools([error for _, error in curve]) for _ in range(size)]
    return tuple((share, error) for (share, _), error in zip(curve, errors, strict=True))
