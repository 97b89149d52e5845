"""How much the maps of recurrent layers matter: ``python -m vlcache_fx.fidelity.map_study hybrid``.

An item turns the state S in front of it into A S + B (see ``plan.jumps``). The same prompts reuse donors:

- ``A and B``: as they were recorded;
- ``B alone``: with A = 0, as if the item forgot all that stood in front of it;
- ``A alone``: with B = 0, as if the item left nothing in the state;
- ``neither``: both are zero.

And per recurrent layer, the spectral norm of A over a whole item: how much of the state in front is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor

from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.compare import Comparison, average, compare, proportion
from vlcache_fx.fidelity.models import check_name, load_cases, load_subject
from vlcache_fx.fidelity.prompts import Case, batches
from vlcache_fx.fidelity.study_output import asking, print_results, readable_errors
from vlcache_fx.fidelity.subject import Subject
from vlcache_fx.fidelity.table import nats, percent
from vlcache_fx.spec.slots import Factor, StoredSlot, Term
from vlcache_fx.store.entry import Entry

KINDS: Mapping[str, tuple[type[StoredSlot], ...]] = {
    "A and B": (),
    "B alone": (Factor,),
    "A alone": (Term,),
    "neither": (Factor, Term),
}
"""Per kind of donor, the slots that are zero."""

Norms = dict[int, list[Tensor]]
"""Per layer, the norms of items' maps, [heads] each."""


def study(
    subject: Subject,
    cases: Sequence[Case],
    *,
    budget: float = 0.02,
    batch: int = 8,
    progress: Callable[[Sequence[list[Case]]], Iterable[list[Case]]] = iter,
) -> tuple[dict[str, list[Comparison]], Norms]:
    """Compare each kind of donor with the unmodified model, on the same prompts; and measure the maps.

    Raises:
        OptionError: the model has no recurrent layers, or does not reuse.
    """
    found: dict[str, list[Comparison]] = {kind: [] for kind in KINDS}
    norms: Norms = {}
    store = subject.engine.store
    for part in progress(batches(cases, batch)):
        subject.record(part)
        donors = {span["key"]: store.get(span["key"]) for span in subject.report["spans"]}
        entries = {key: entry for key, entry in donors.items() if entry is not None}
        for entry in entries.values():
            for layer, norm in map_norms(entry).items():
                norms.setdefault(layer, []).append(norm)
        if not norms:
            raise OptionError(f"{subject.name} has no recurrent layers")
        prepared = subject.prepare([case.asked for case in part])
        exact = subject.exact(prepared)
        for kind, slots in KINDS.items():
            subject.engine.clear()
            for key, entry in entries.items():
                store.put(key, without(entry, slots))
            with subject.engine.using(policy="first_k", budget=budget):
                found[kind] += compare(exact, subject.answer(prepared), prepared.answers)
            subject.recomputed()  # raises if a donor was not reused
    return found, norms


def without(entry: Entry, slots: tuple[type[StoredSlot], ...]) -> Entry:
    """Return a donor with zeros in these slots."""
    tensors = {
        name: torch.zeros_like(tensor) if isinstance(StoredSlot.parse(name), slots) else tensor
        for name, tensor in entry.tensors.items()
    }
    return Entry(tensors, entry.info)


def map_norms(entry: Entry) -> dict[int, Tensor]:
    """Return, per layer, the spectral norm of A over the whole item, [heads]: one recurrence a layer."""
    found = {}
    for name, factors in entry.tensors.items():
        slot = StoredSlot.parse(name)
        if isinstance(slot, Factor):
            whole = factors[0].double()
            for factor in factors[1:]:
                whole = factor.double() @ whole
            found[slot.layer] = torch.linalg.matrix_norm(whole, ord=2)
    return found


def answers_table(found: Mapping[str, Sequence[Comparison]], title: str) -> Table:
    """Create a table with one row per kind of donor."""
    table = Table("donor", "prompts", "KL (nats)", "same answer", "correct", title=title)
    for kind, comparisons in found.items():
        table.add_row(
            kind,
            f"{len(comparisons):,}",
            nats(average([comparison.kl for comparison in comparisons])),
            percent(proportion([comparison.agrees for comparison in comparisons])),
            percent(proportion([comparison.right for comparison in comparisons])),
        )
    return table


def norms_table(norms: Norms, title: str) -> Table:
    """Create a table with one row per recurrent layer: medians over items, of each head."""
    table = Table("layer", "norm of A, per head", title=title)
    for layer, measured in sorted(norms.items()):
        medians = torch.stack(measured).median(0).values.tolist()
        table.add_row(str(layer), ", ".join(f"{norm:.2g}" for norm in medians))
    return table


def main(
    model: Annotated[str, typer.Argument(help="hybrid, or a folder of a transformers model")] = "hybrid",
    data: Annotated[Path | None, typer.Option(help="prompts, as for vlcache fidelity")] = None,
    count: Annotated[int, typer.Option(help="questions of each kind")] = 50,
    budget: Annotated[float, typer.Option(help="share of token-layers to recompute")] = 0.02,
    batch: Annotated[int, typer.Option(help="prompts per call")] = 8,
    positions: Annotated[int, typer.Option(help="maximum number of answer tokens to compare")] = 1,
    seed: Annotated[int, typer.Option(help="seed of the questions")] = 0,
) -> None:
    """Compare donors with and without parts of their maps, and measure the maps."""
    with readable_errors():
        check_name(model)
        cases = load_cases(model, data, (), count, split="test", seed=seed)
        subject = load_subject(model, positions, {"lowering": "eager", "strict": True})
        found, norms = study(
            subject,
            cases,
            budget=budget,
            batch=batch,
            progress=asking,
        )
    print_results(
        answers_table(found, f"{model}, {100 * budget:g} % budget"),
        norms_table(norms, f"{model}, medians over items"),
    )


if __name__ == "__main__":
    typer.run(main)
