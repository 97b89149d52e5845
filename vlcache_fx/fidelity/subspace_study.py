"""Compares donors of several contexts: ``python -m vlcache_fx.fidelity.subspace_study smollm2``.

Items are computed exactly behind up to eight prompts, then reused behind others. A donor is one context, the
mean of several, or their mean with differences of a rank, as ``runtime.donors.subspace`` stores them and
programs fit them. ``whole`` differences, fitted to exact rows outside of the runtime, show what a rank
costs. Each row of the table is one donor at one budget, on the same prompts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from statistics import fmean, median
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.compare import Comparison, average, compare, proportion
from vlcache_fx.fidelity.donor_kinds import fitted, mean
from vlcache_fx.fidelity.donor_study import another, record
from vlcache_fx.fidelity.models import STUDIED, check_name, load_subject
from vlcache_fx.fidelity.questions import Questions, make_prompt, one_item_questions
from vlcache_fx.fidelity.study_output import asking, print_results, readable_errors
from vlcache_fx.fidelity.subject import Subject
from vlcache_fx.fidelity.table import nats, percent
from vlcache_fx.runtime.donors.donor_dtype import length_of
from vlcache_fx.store.entry import Entry
from vlcache_fx.testing.donors import with_differences

PROMPTS: Mapping[str, Mapping[str, Any]] = {
    "short": {"question_first": False, "system_words": 6},
    "long": {"question_first": False, "system_words": 60},
    "question first": {"question_first": True, "system_words": 20},
}
"""Kinds of prompts behind which an item returns, and what makes them."""


@dataclass(frozen=True)
class Combination:
    """A kind of donor.

    Attributes:
        contexts: number of contexts in it.
        rank: rank of the differences; 0 for their mean alone, None for whole differences.
    """

    contexts: int
    rank: int | None = 0

    @classmethod
    def parse(cls, text: str) -> Combination:
        """Read ``8`` (the mean of 8 contexts), ``8x16`` (with differences of rank 16) or ``8xwhole``.

        Raises:
            OptionError: another text.
        """
        found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*|whole))?", text)
        if found is None or (found[1] == "1" and found[2]):
            raise OptionError(f"donor {text!r} is not valid: it must be like 1, 8, 8x16 or 8xwhole")
        return cls(int(found[1]), None if found[2] == "whole" else int(found[2] or 0))

    @property
    def label(self) -> str:
        """Name in tables."""
        if self.rank == 0:
            return "one context" if self.contexts == 1 else f"mean of {self.contexts}"
        return f"{self.contexts} fitted, " + ("whole" if self.rank is None else f"rank {self.rank}")

    def donor(self, kept: Sequence[Entry]) -> Entry:
        """The donor of the first ``contexts`` contexts, without whole differences."""
        return (
            with_differences(kept[: self.contexts], self.rank) if self.rank else mean(kept[: self.contexts])
        )

    def byte_share(self, donor: Entry, single: Entry) -> float:
        """Bytes of a donor, as a share of those of a donor of a single context."""
        return float(self.contexts) if self.rank is None else donor.nbytes / single.nbytes


COMBINATIONS = (
    Combination(1),
    Combination(4),
    Combination(8),
    Combination(4, 16),
    Combination(8, 8),
    Combination(8, 16),
    Combination(8, 32),
    Combination(8, None),
)

OPTIONS = {"lowering": "eager", "strict": True, "donor_rank": 32}
"""The rank only turns fitting on: donors are made by the study."""

Found = dict[tuple[Combination, float, str], list[Comparison]]
"""Donor, budget, kind of prompt -> comparisons, in equal order."""


def study(
    subject: Subject,
    source: Questions,
    items: int,
    budgets: Sequence[float],
    *,
    combinations: Sequence[Combination] = COMBINATIONS,
    batch: int = 4,
    split: str = "test",
    skip: int = 0,
    seed: int = 0,
    progress: Callable[[range], Iterable[int]] = iter,
) -> tuple[Found, dict[Combination, float]]:
    """Compare donors with the unmodified model.

    Returns:
        The comparisons, and each combination's bytes as a share of a donor of one context (mean).
    """
    rng = np.random.default_rng(seed)
    found: Found = {}
    sizes: dict[Combination, list[float]] = {combination: [] for combination in combinations}
    asked = one_item_questions(source, split, items, seed + 1, skip)
    for start in progress(range(0, items, batch)):
        first = asked[start : start + batch]
        contexts = [
            record(subject, source, [another(source, question, rng) for question in first])
            for _ in range(max(combination.contexts for combination in combinations))
        ]
        donors = {
            combination: [
                {key: combination.donor([context[index][key] for context in contexts]) for key in own}
                for index, own in enumerate(contexts[0])
            ]
            for combination in combinations
        }
        for combination, built in donors.items():
            sizes[combination] += [
                combination.byte_share(donor, contexts[0][index][key])
                for index, own in enumerate(built)
                for key, donor in own.items()
            ]
        for name, settings in PROMPTS.items():
            new = [source.ask_again(question, rng, **settings) for question in first]
            truth = record(subject, source, new)
            prepared = subject.prepare([make_prompt(source, question) for question in new])
            exact = subject.exact(prepared)
            for budget in budgets:
                for combination in combinations:
                    subject.engine.clear()
                    for index, own in enumerate(truth):
                        for key, entry in own.items():
                            donor, rows = donors[combination][index][key], int(budget * length_of(entry))
                            if combination.rank is None and rows:
                                kept = [context[index][key] for context in contexts[: combination.contexts]]
                                donor = fitted(kept, entry, rows)
                            subject.engine.store.put(key, donor)
                    with subject.engine.using(policy="first_k", budget=budget):
                        compared = compare(exact, subject.answer(prepared), prepared.answers)
                    subject.recomputed()  # raises if a donor was not reused
                    found.setdefault((combination, budget, name), []).extend(compared)
    return found, {combination: fmean(share) for combination, share in sizes.items()}


def results_table(found: Found, byte_shares: Mapping[Combination, float], title: str) -> Table:
    """Create a table with one row per budget and donor; ``closer`` counts prompts, beside one context."""
    names = list(dict.fromkeys(name for _, _, name in found))
    table = Table(
        "budget",
        "donor",
        "bytes",
        "KL (nats)",
        "of one",
        "median",
        "closer",
        *names,
        "agreement",
        title=title,
    )
    for budget in dict.fromkeys(budget for _, budget, _ in found):
        base = _all(found, Combination(1), budget, names)
        for combination in dict.fromkeys(combination for combination, _, _ in found):
            own = _all(found, combination, budget, names)
            kls = [comparison.kl for comparison in own]
            of_one = fmean(kls) / fmean(comparison.kl for comparison in base) if base else float("nan")
            table.add_row(
                f"{100 * budget:g} %",
                combination.label,
                f"{byte_shares[combination]:.2f}",
                nats(average(kls)),
                f"{of_one:.2f}",
                f"{median(kls):.2g}",
                _closer(kls, [comparison.kl for comparison in base]) if combination != Combination(1) else "",
                *(f"{fmean(one.kl for one in found[combination, budget, name]):.2g}" for name in names),
                percent(proportion([comparison.agrees for comparison in own])),
            )
        table.add_section()
    return table


def _closer(kls: Sequence[float], of_one: Sequence[float]) -> str:
    if not of_one:
        return ""
    return percent(proportion([own < one for own, one in zip(kls, of_one, strict=True)]))


def _all(found: Found, combination: Combination, budget: float, names: Sequence[str]) -> list[Comparison]:
    return [one for name in names for one in found.get((combination, budget, name), ())]


def main(
    model: Annotated[str, typer.Argument(help=f"one of {', '.join(STUDIED)}")] = "smollm2",
    items: Annotated[int, typer.Option(min=2, help="items; each returns behind three prompts")] = 30,
    budget: Annotated[
        list[float] | None, typer.Option(help="shares of an item's first rows that are recomputed")
    ] = None,
    donor: Annotated[
        list[str] | None, typer.Option(help="contexts, and rank of their differences: 1, 8, 8x16, 8xwhole")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="prompts per call")] = 4,
    split: Annotated[str, typer.Option(help="items: test or train")] = "test",
    skip: Annotated[int, typer.Option(min=0, help="leave out so many items, the first ones")] = 0,
    seed: Annotated[int, typer.Option(help="seed of items and prompts")] = 0,
) -> None:
    """Compare donors of one context, means, and fitted donors."""
    with readable_errors():
        check_name(model, STUDIED)
        combinations = tuple(map(Combination.parse, donor)) if donor else COMBINATIONS
        subject = load_subject(model, None, OPTIONS)
        found, byte_shares = study(
            subject,
            import_module(STUDIED[model]),
            items,
            budget or (0.02, 0.05),
            combinations=combinations,
            batch=batch,
            split=split,
            skip=skip,
            seed=seed,
            progress=asking,
        )
    print_results(results_table(found, byte_shares, f"{model}, {items} items, three prompts each"))


if __name__ == "__main__":
    typer.run(main)
