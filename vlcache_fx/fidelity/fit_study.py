"""Compares ways to fit donors: ``python -m vlcache_fx.fidelity.fit_study smollm2``.

Each item is computed exactly in eight contexts, then reused behind another prompt, with as many recomputed
rows in every layer. The combination of contexts is

- ``mean``: their mean;
- ``fitted``: fitted to the recomputed rows by ridge regression, as programs do, with whole differences;
- ``rank 16``, ``rank 16, int8``: likewise, with differences of that rank, and with 8-bit factors; ``ridge``
  is other regularisation than theirs;
- ``per head``: with weights per head;
- ``nearest prompts``: weighted by the distance of embeddings of the text in front (as KVCOMM does, arXiv
  2510.12872);
- ``prompt adapter``: the mean, and what the same system prompt changed in three other items, row by row;
- ``fitted, and adapter``: fitted, with that change as one more context.

``fitted, spread rows`` and ``fitted, half spread`` recompute rows at even distances, all or half of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from vlcache_fx.fidelity.donor_kinds import blend
from vlcache_fx.fidelity.donor_study import another
from vlcache_fx.fidelity.layer_study import CONTEXTS
from vlcache_fx.fidelity.llama_prompts import Embedded, compared, recorded
from vlcache_fx.fidelity.llama_rows import Fit, Item, LlamaRows, Schedule
from vlcache_fx.fidelity.models import STUDIED, check_name, load_subject
from vlcache_fx.fidelity.paired import Answer, Groups, paired_table
from vlcache_fx.fidelity.questions import Questions, one_item_questions
from vlcache_fx.fidelity.study_output import asking, print_results, readable_errors
from vlcache_fx.fidelity.subject import Subject
from vlcache_fx.fidelity.subspace_study import PROMPTS

GROUP = 4
"""Items that return behind one system prompt."""

RANK = 16

Alternative = tuple[Item, Schedule, Fit | None]
Recorded = tuple[Embedded, Item, Tensor]


def per_head(contexts: Tensor, rows: Tensor, exact: Tensor) -> Tensor:
    """Fit each head by itself; see ``donor_kinds.blend``."""
    heads = zip(contexts.unbind(2), exact.unbind(1), strict=True)
    return torch.stack([blend(head, rows, own) for head, own in heads], 1)


def low_rank(item: Item, rank: int, packed: bool = False) -> Item:
    """Return an item whose contexts differ from their mean by matrices of ``rank`` with shared factors.

    Args:
        item: the item.
        rank: of the differences.
        packed: round the factors to 8 bits, with a scale per direction.
    """

    def cut(contexts: Tensor) -> Tensor:
        middle = contexts.mean(0)
        parts = (contexts - middle).flatten(2)
        right = torch.linalg.eigh(torch.einsum("cnw,cnv->wv", parts, parts))[1][:, -rank:]
        seen = parts @ right
        left = torch.linalg.svd(seen.transpose(0, 1).flatten(1), full_matrices=False)[0][:, :rank]
        core = left.t() @ seen
        if packed:
            left, right, core = (rounded(part) for part in (left, right, core))
        nearer: Tensor = middle + (left @ core @ right.t()).view_as(contexts)
        return nearer

    return Item(tuple(map(cut, item.keys)), tuple(map(cut, item.values)), item.hidden)


def rounded(factor: Tensor) -> Tensor:
    """Return a factor with 8 bits per element and a scale per column."""
    scale = factor.abs().amax(-2, keepdim=True).clamp(min=1e-12) / 127
    packed: Tensor = (factor / scale).round() * scale
    return packed


def with_changes(item: Item, changes: Sequence[Item], keep: bool) -> Item:
    """Return an item moved by the mean change of others, row by row; rows beyond theirs stay.

    Args:
        item: contexts of the item.
        changes: of each other item, one new context minus the mean of its contexts.
        keep: keep the contexts and add the moved mean to them; else only the moved mean.
    """

    def moved(contexts: Tensor, others: Sequence[Tensor]) -> Tensor:
        middle = contexts.mean(0, keepdim=True)
        length = middle.shape[1]
        total = torch.zeros_like(middle)
        for other in others:
            shared = min(length, other.shape[1])
            total[:, :shared] += other[:, :shared] / len(others)
        return torch.cat([contexts, middle + total]) if keep else middle + total

    keys = zip(item.keys, zip(*(change.keys for change in changes), strict=True), strict=True)
    values = zip(item.values, zip(*(change.values for change in changes), strict=True), strict=True)
    hidden = item.hidden.mean(0, keepdim=True)
    return Item(
        tuple(moved(own, others) for own, others in keys),
        tuple(moved(own, others) for own, others in values),
        hidden,
    )


def change(item: Item, new: Item) -> Item:
    """Return a new context of an item minus the mean of its contexts."""
    return Item(
        tuple(b - a.mean(0, keepdim=True) for a, b in zip(item.keys, new.keys, strict=True)),
        tuple(b - a.mean(0, keepdim=True) for a, b in zip(item.values, new.values, strict=True)),
        new.hidden - item.hidden.mean(0, keepdim=True),
    )


def by_distance(prompts: Sequence[Embedded], new: Embedded) -> Fit:
    """Return what weighs contexts by the distance of the mean embedding of the text in front."""
    own = new.embeds[: new.start].mean(0)
    distances = torch.stack([(prompt.embeds[: prompt.start].mean(0) - own).norm() for prompt in prompts])
    weights = torch.softmax(-distances, 0)

    def weigh(contexts: Tensor, rows: Tensor, exact: Tensor) -> Tensor:  # noqa: ARG001 (a Fit)
        weighed: Tensor = torch.tensordot(weights, contexts, 1)
        return weighed

    return weigh


def alternatives(
    rows: LlamaRows, budget: float, stored: Sequence[Recorded], new: Recorded, changes: Sequence[Item]
) -> dict[str, Alternative]:
    """Return what is compared: an item, a schedule, and a fit, by name."""
    item = Item.stack([context for _, context, _ in stored])
    length = new[0].length
    count = max(1, int(budget * length))
    spread = torch.linspace(0, length - 1, count).long()
    half = torch.cat([torch.arange(count - count // 2), torch.linspace(count, length - 1, count // 2).long()])

    def everywhere(chosen: Tensor) -> Schedule:
        return Schedule((chosen,) * rows.num_layers, (chosen,) * rows.num_layers)

    first = everywhere(torch.arange(count))
    return {
        "one context": (item.first(1), first, None),
        "mean": (item, first, None),
        "fitted": (item, first, blend),
        f"rank {RANK}": (low_rank(item, RANK), first, blend),
        f"rank {RANK}, int8": (low_rank(item, RANK, packed=True), first, blend),
        f"rank {RANK}, ridge 1": (low_rank(item, RANK), first, functools.partial(blend, ridge=1.0)),
        f"rank {RANK}, ridge 10": (low_rank(item, RANK), first, functools.partial(blend, ridge=10.0)),
        "per head": (item, first, per_head),
        "nearest prompts": (item, first, by_distance([prompt for prompt, _, _ in stored], new[0])),
        "prompt adapter": (with_changes(item, changes, keep=False), first, None),
        "fitted, and adapter": (with_changes(item, changes, keep=True), first, blend),
        "fitted, spread rows": (item, everywhere(spread), blend),
        "fitted, half spread": (item, everywhere(half), blend),
    }


def study(
    subject: Subject,
    source: Questions,
    items: int,
    budget: float,
    *,
    seed: int = 0,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Groups:
    """Compare fits with the unmodified decoder, on the same prompts; groups are kinds of prompts."""
    rng = np.random.default_rng(seed)
    rows = LlamaRows(subject.model)
    found: Groups = {"all": {}}
    questions = one_item_questions(source, "test", items, seed + 1)
    for start in progress(range(0, items - GROUP + 1, GROUP)):
        asked = questions[start : start + GROUP]
        stored = [
            [
                _without_hidden(recorded(subject, rows, source, another(source, question, rng)))
                for _ in range(CONTEXTS)
            ]
            for question in asked
        ]
        means = [Item.stack([context for _, context, _ in own]) for own in stored]
        for name, settings in PROMPTS.items():
            again = [source.ask_again(question, rng, **settings) for question in asked]
            again = [
                dataclasses.replace(question, system_prompt=again[0].system_prompt) for question in again
            ]
            new = [_without_hidden(recorded(subject, rows, source, question)) for question in again]
            changes = [change(item, context) for item, (_, context, _) in zip(means, new, strict=True)]
            for index, (prompt, _, exact) in enumerate(new):
                others = [other for at, other in enumerate(changes) if at != index]
                tried = alternatives(rows, budget, stored[index], new[index], others)
                for label, (item, schedule, fit) in tried.items():
                    logits = rows.reuse(prompt.embeds, prompt.start, item, prompt.last, schedule, fit)
                    cost = schedule.cost(prompt.length, rows.key_value_share)
                    answer = Answer(compared(exact, logits, prompt), cost)
                    for group in ("all", name):
                        found.setdefault(group, {}).setdefault(label, []).append(answer)
    return found


def _without_hidden(computed: Recorded) -> Recorded:
    """Drop the hidden states, the largest part: no alternative skips layers."""
    prompt, item, logits = computed
    return prompt, Item(item.keys, item.values, item.hidden[:, :, :0].clone()), logits


def main(
    model: Annotated[str, typer.Argument(help="smollm2 or photo")] = "smollm2",
    items: Annotated[int, typer.Option(min=GROUP, help="items; each returns behind three prompts")] = 32,
    budget: Annotated[float, typer.Option(help="share of an item's rows that is recomputed")] = 0.02,
    seed: Annotated[int, typer.Option(help="seed of items and prompts")] = 0,
) -> None:
    """Compare ways to fit donors."""
    with readable_errors():
        check_name(model, STUDIED)
        subject = load_subject(model, None, {"lowering": "eager"})
        found = study(
            subject,
            import_module(STUDIED[model]),
            items,
            budget,
            seed=seed,
            progress=asking,
        )
    print_results(paired_table(found, "fitted", f"{model}, {items} items, {100 * budget:g} % of the rows"))


if __name__ == "__main__":
    typer.run(main)
