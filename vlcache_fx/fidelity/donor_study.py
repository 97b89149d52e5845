"""Compares kinds of donors: ``python -m vlcache_fx.fidelity.donor_study reference``.

The same pictures are computed exactly after several prompts, then reused after others, with these donors:

- ``one``: a single context;
- ``mean of 2``, ``mean of 4``: mean of the position-free keys and values of several contexts (option
  ``donor_contexts``);
- ``nearest``: of four contexts, the context whose system prompt shares most words with the new prompt;
- ``typical``: a context with a short, common system prompt;
- ``fitted``: weighted mean of the four contexts, fitted to the recomputed rows of the new context;
- ``rank 1 patch``, ``rank 8 patch``: mean of the four plus the best correction of this rank, computed from
  the new context: the limit of low-rank corrections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from vlcache_fx.fidelity.compare import Comparison, average, compare, proportion
from vlcache_fx.fidelity.donor_kinds import fitted, mean, nearest, patched
from vlcache_fx.fidelity.models import STUDIED, check_name, load_subject
from vlcache_fx.fidelity.prompts import Case
from vlcache_fx.fidelity.questions import Questions, make_prompt
from vlcache_fx.fidelity.study_output import asking, print_results, readable_errors
from vlcache_fx.fidelity.subject import Subject
from vlcache_fx.fidelity.table import nats, percent
from vlcache_fx.runtime.donors.donor_dtype import length_of
from vlcache_fx.store.entry import Entry

CONTEXTS = 4
TYPICAL = "you are a helpful assistant ."
KINDS = (
    "one",
    "mean of 2",
    "mean of 4",
    "nearest",
    "typical",
    "fitted",
    "rank 1 patch",
    "rank 8 patch",
)

Donors = Sequence[Mapping[str, Entry]]
"""Per prompt of a batch: key of an item -> its exact donor."""


def study(
    subject: Subject,
    source: Questions,
    pictures: int,
    *,
    budget: float = 0.02,
    batch: int = 8,
    seed: int = 0,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[str, list[Comparison]]:
    """Compare each kind of donor with the unmodified model, on the same prompts."""
    rng = np.random.default_rng(seed)
    families = [family for family in source.FAMILIES if family != "same"]
    found: dict[str, list[Comparison]] = {kind: [] for kind in KINDS}
    for start in progress(range(0, pictures, batch)):
        family = families[(start // batch) % len(families)]
        first = source.make_questions("test", family, min(batch, pictures - start), seed=seed + 1 + start)
        contexts = [[another(source, question, rng) for question in first] for _ in range(CONTEXTS)]
        asked = [another(source, question, rng) for question in first]
        donors = [record(subject, source, context) for context in contexts]
        short = [
            dataclasses.replace(question, system_prompt=TYPICAL, question_first=False)
            for question in contexts[0]
        ]
        typical = record(subject, source, short)
        truth = record(subject, source, asked)
        prepared = subject.prepare([make_prompt(source, question) for question in asked])
        exact = subject.exact(prepared)
        for kind in KINDS:
            subject.engine.clear()
            for index, new in enumerate(asked):
                prompts = [context[index].system_prompt for context in contexts]
                near = nearest(prompts, new.system_prompt)
                for key in donors[0][index]:
                    kept = [donor[index][key] for donor in donors]
                    donor = _donor(kind, kept, near, typical[index][key], truth[index][key], budget)
                    subject.engine.store.put(key, donor)
            with subject.engine.using(policy="uniform", budget=budget):
                found[kind] += compare(exact, subject.answer(prepared), prepared.answers)
            subject.recomputed()  # raises if a donor was not reused
    return found


def _donor(kind: str, kept: Sequence[Entry], near: int, typical: Entry, exact: Entry, budget: float) -> Entry:
    """Create a donor of one of ``KINDS`` from stored contexts and the new context's exact rows."""
    rows = max(1, int(budget * length_of(exact)))
    makers: dict[str, Callable[[], Entry]] = {
        "one": lambda: kept[0],
        "mean of 2": lambda: mean(kept[:2]),
        "mean of 4": lambda: mean(kept),
        "nearest": lambda: kept[near],
        "typical": lambda: typical,
        "fitted": lambda: fitted(kept, exact, rows),
        "rank 1 patch": lambda: patched(kept, exact, 1),
        "rank 8 patch": lambda: patched(kept, exact, 8),
    }
    return makers[kind]()


def another(source: Questions, question: Any, rng: np.random.Generator) -> Any:
    """The same pictures behind another system prompt, with the question before or after them."""
    return source.ask_again(question, rng, question_first=bool(rng.random() < 0.5))


def record(subject: Subject, source: Questions, questions: Sequence[Any]) -> Donors:
    """Return the donors that a cold call with these questions records."""
    prompts = [make_prompt(source, question) for question in questions]
    subject.record([Case("donor", prompt, prompt) for prompt in prompts])
    found: list[dict[str, Entry]] = [{} for _ in prompts]
    for span in subject.report["spans"]:
        entry = subject.engine.store.get(span["key"])
        assert entry is not None
        found[span["sample"]][span["key"]] = entry
    return found


def results_table(found: Mapping[str, Sequence[Comparison]], title: str) -> Table:
    """Create a table with one row per kind of donor."""
    table = Table("donor", "prompts", "KL (nats)", "median", "agreement", "correct", title=title)
    for kind, comparisons in found.items():
        kl = average([comparison.kl for comparison in comparisons])
        agreement = proportion([comparison.agrees for comparison in comparisons])
        right = proportion([comparison.right for comparison in comparisons])
        table.add_row(
            kind,
            f"{len(comparisons):,}",
            nats(kl),
            f"{median(comparison.kl for comparison in comparisons):.2g}",
            percent(agreement),
            percent(right),
        )
    return table


def main(
    model: Annotated[str, typer.Argument(help=f"one of {', '.join(STUDIED)}")] = "reference",
    pictures: Annotated[int, typer.Option(help="sets of pictures; one question each")] = 200,
    budget: Annotated[float, typer.Option(help="share of token-layers to recompute")] = 0.02,
    batch: Annotated[int, typer.Option(help="prompts per call")] = 8,
    positions: Annotated[int, typer.Option(help="maximum number of answer tokens to compare")] = 1,
    seed: Annotated[int, typer.Option(help="seed of the questions")] = 0,
) -> None:
    """Compare donors: one context, means, the nearest context, a typical context, and corrections."""
    with readable_errors():
        check_name(model, STUDIED)
        subject = load_subject(model, positions, {"lowering": "eager", "strict": True})
        found = study(
            subject,
            import_module(STUDIED[model]),
            pictures,
            budget=budget,
            batch=batch,
            seed=seed,
            progress=asking,
        )
    print_results(results_table(found, f"{model}, {100 * budget:g} % budget"))


if __name__ == "__main__":
    typer.run(main)
