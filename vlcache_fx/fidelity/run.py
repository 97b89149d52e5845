"""Compares policies and budgets with the unmodified model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.compare import Comparison, Interval, average, compare, proportion
from vlcache_fx.fidelity.prompts import Case, batches
from vlcache_fx.fidelity.subject import Subject
from vlcache_fx.options import Options
from vlcache_fx.policies.base import Policy
from vlcache_fx.policies.profile import Profile
from vlcache_fx.runtime.donors.donor_dtype import MODEL

BUDGETS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 1.0)
ALL = "all"


@dataclass(frozen=True)
class Setting:
    """A policy (name or object), a budget, and an optional profile, to compare with full recompute.

    ``donor_dtype`` and ``donor_rank`` are the options of these names, None for the engine's; ``contexts`` is
    the number of prompts in which donors are recorded.
    """

    policy: str | Policy
    budget: float
    profile: Profile | None = None
    donor_dtype: str | None = None
    contexts: int = 1
    donor_rank: int | None = None

    @property
    def name(self) -> str:
        """Name of the policy."""
        return self.policy if isinstance(self.policy, str) else self.policy.name

    @property
    def label(self) -> str:
        """Label in tables: the policy, and what donors are unless they are as by default."""
        parts = [self.name]
        if self.donor_dtype not in (None, MODEL):
            parts.append(str(self.donor_dtype))
        if self.contexts > 1:
            fitted = f", rank {self.donor_rank}" if self.donor_rank else ""
            parts.append(f"{self.contexts} contexts{fitted}")
        return ", ".join(parts)

    def options(self, options: Options) -> Options:
        """The options of an engine with those of this setting."""
        return replace(
            options,
            donor_dtype=options.donor_dtype if self.donor_dtype is None else self.donor_dtype,
            donor_rank=options.donor_rank if self.donor_rank is None else self.donor_rank,
        )


def settings(
    policies: Sequence[str | Policy],
    budgets: Sequence[float] = BUDGETS,
    profile: Profile | None = None,
    donor_dtypes: Sequence[str | None] = (None,),
    contexts: Sequence[int] = (1,),
    donor_ranks: Sequence[int | None] = (None,),
) -> list[Setting]:
    """Combine policies, budgets and donors; ``none`` represents all policies at 0, ``full`` at 1.

    Differences of any rank need several contexts.
    """
    chosen = []
    if 0 in budgets:
        chosen.append(Setting("none", 0.0))
    between = [budget for budget in budgets if 0 < budget < 1]
    chosen += [Setting(policy, budget, profile) for policy in policies for budget in between]
    if 1 in budgets:
        chosen.append(Setting("full", 1.0))
    return [
        replace(setting, donor_dtype=dtype, contexts=count, donor_rank=rank)
        for dtype in donor_dtypes
        for count in contexts
        for rank in (donor_ranks if count > 1 else donor_ranks[:1])
        for setting in chosen
    ]


@dataclass(frozen=True)
class Score:
    """Scores of a setting in a family (or ``all``).

    Attributes:
        policy: label of the setting: its policy and the donors' dtype.
        recomputed: recomputed share of the reused spans' token-layers, mean over the prompts.
        accuracy: share of correct answers.
        exact_accuracy: the unmodified model's share of correct answers, on the same prompts.
        agreement: share of prompts with equal predictions at every answer token.
        kl: divergence from the unmodified model, nats per token.
    """

    policy: str
    budget: float
    family: str
    prompts: int
    recomputed: float
    accuracy: Interval
    exact_accuracy: Interval
    agreement: Interval
    kl: Interval


@dataclass
class _Found:
    comparisons: list[Comparison] = field(default_factory=list)
    exact: list[Comparison] = field(default_factory=list)
    recomputed: list[float] = field(default_factory=list)


def run(
    subject: Subject,
    cases: Sequence[Case],
    compared: Sequence[Setting],
    *,
    batch: int = 16,
    after_batch: Callable[[int], None] | None = None,
) -> list[Score]:
    """Run every case with every setting; return scores per setting and family, and over all families.

    Args:
        subject: compiled with any policy; other policies do not recompile.
        cases: any number of families.
        compared: the settings.
        batch: prompts per call.
        after_batch: called with the number of finished cases.

    Raises:
        OptionError: there is nothing to compare, or this model or prompt is not reused.
    """
    if not cases or not compared:
        raise OptionError(f"nothing to compare: {len(cases)} cases, {len(compared)} settings")
    found: dict[tuple[int, str], _Found] = {}
    options = subject.engine.options
    try:
        _fill(found, subject, cases, compared, batch, after_batch)
    finally:
        subject.engine.set_options(options)
    return [_score(compared[index], family, results) for (index, family), results in sorted(found.items())]


def _fill(
    found: dict[tuple[int, str], _Found],
    subject: Subject,
    cases: Sequence[Case],
    compared: Sequence[Setting],
    batch: int,
    after_batch: Callable[[int], None] | None,
) -> None:
    options = subject.engine.options
    for own in batches(cases, batch):
        question = subject.prepare([case.asked for case in own])
        exact = subject.exact(question)
        truth = compare(exact, exact, question.answers)
        recorded: tuple[Any, ...] | None = None
        for index, setting in enumerate(compared):
            needed = (setting.donor_dtype, setting.contexts, setting.donor_rank)
            if needed != recorded:
                recorded = needed
                subject.engine.set_options(setting.options(options))
                subject.record(own, setting.contexts)
            with subject.engine.using(policy=setting.policy, budget=setting.budget, profile=setting.profile):
                comparisons = compare(exact, subject.answer(question), question.answers)
            share = subject.recomputed()
            for family in (own[0].family, ALL):
                results = found.setdefault((index, family), _Found())
                results.comparisons += comparisons
                results.exact += truth
                results.recomputed += [share] * len(own)
        if after_batch is not None:
            after_batch(len(own))


def _score(setting: Setting, family: str, found: _Found) -> Score:
    return Score(
        policy=setting.label,
        budget=setting.budget,
        family=family,
        prompts=len(found.comparisons),
        recomputed=fmean(found.recomputed),
        accuracy=proportion([comparison.right for comparison in found.comparisons]),
        exact_accuracy=proportion([comparison.right for comparison in found.exact]),
        agreement=proportion([comparison.agrees for comparison in found.comparisons]),
        kl=average([comparison.kl for comparison in found.comparisons]),
    )
