"""Compares schedules of rows over layers: ``python -m vlcache_fx.fidelity.layer_study smollm2``.

All cost the same: work in the item's rows (matrix products; keys and values alone count less). They are:

- ``uniform``: as many rows in every layer;
- ``until l``: more rows, which end before layer l;
- ``calibrated``: row counts as ``layer_aware`` chooses them, with sensitivities and an error curve measured
  on other items (``fidelity.calibrate``, without its check);
- ``delta from l``: more rows, which add the donor's difference between output and input of the layers from l
  on instead of attention and MLP (donor-delta skipping); ``delta in l to m``: in these layers.

Donors are of one context, or of eight whose combination is fitted to the rows that a layer knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import typer

from vlcache_fx.fidelity.calibrate import SHARES, depths_of, falling, sensitivities
from vlcache_fx.fidelity.donor_kinds import blend
from vlcache_fx.fidelity.donor_study import another
from vlcache_fx.fidelity.llama_prompts import compared, recorded
from vlcache_fx.fidelity.llama_rows import Fit, Item, LlamaRows, Schedule
from vlcache_fx.fidelity.models import STUDIED, check_name, load_subject
from vlcache_fx.fidelity.paired import Answer, Groups, paired_table
from vlcache_fx.fidelity.questions import Questions, one_item_questions
from vlcache_fx.fidelity.study_output import asking, print_results, readable_errors
from vlcache_fx.fidelity.subject import Subject
from vlcache_fx.fidelity.subspace_study import PROMPTS
from vlcache_fx.policies.layer_aware import row_counts
from vlcache_fx.policies.profile import Profile

CONTEXTS = 8
DONORS: Mapping[str, tuple[int, Fit | None]] = {"one context": (1, None), "8 fitted": (CONTEXTS, blend)}
DEPTH_SHARE = 0.05
"""Share of rows that stop at each depth, as ``calibrate`` measures them."""


def schedules(length: int, rows: LlamaRows, budget: float, measured: Profile) -> dict[str, Schedule]:
    """Return the schedules for an item of ``length`` rows, by name."""
    layers, share = rows.num_layers, rows.key_value_share
    first = int(budget * length)
    uniform = Schedule.of_counts((first,) * layers)
    wanted = uniform.cost(length, share)

    def at_equal_cost(make: Callable[[int], Schedule]) -> Schedule:
        count = round(wanted / make(1).cost(length, share))  # each row costs the same
        return make(min(length, count))

    def until(depth: int) -> Schedule:
        return at_equal_cost(lambda count: Schedule.of_counts((count,) * depth + (0,) * (layers - depth)))

    def delta(start: int, end: int) -> Schedule:
        return at_equal_cost(lambda count: Schedule.of_counts((count,) * layers, range(start, end)))

    counts = row_counts(length, layers, measured, first * layers)
    found = {"none": Schedule.of_counts((0,) * layers), "uniform": uniform}
    found |= {f"until {depth}": until(depth) for depth in (round(layers * part) for part in (0.9, 0.8, 0.67))}
    found["calibrated"] = Schedule.of_counts(counts)
    for part in (0.83, 0.67, 0.5, 0.33):
        found[f"delta from {round(layers * part)}"] = delta(round(layers * part), layers)
    low, high = round(0.4 * layers), round(0.7 * layers)
    return found | {f"delta in {low} to {high - 1}": delta(low, high)}


def measure(
    subject: Subject, rows: LlamaRows, source: Questions, questions: Sequence[Any], rng: np.random.Generator
) -> Profile:
    """Measure error by rows and by depth, as ``fidelity.calibrate`` does, with donors of one context."""
    layers = rows.num_layers
    depths = depths_of(layers)
    tried = [(share, layers) for share in SHARES] + [(DEPTH_SHARE, depth) for depth in depths]
    errors: list[list[float]] = [[] for _ in tried]
    for question in questions:
        (first, item, _), (new, _, exact) = (
            recorded(subject, rows, source, another(source, question, rng)) for _ in range(2)
        )
        for (share, depth), found in zip(tried, errors, strict=True):
            counts = (math.ceil(share * first.length),) * depth + (0,) * (layers - depth)
            logits = rows.reuse(new.embeds, new.start, item, new.last, Schedule.of_counts(counts))
            found.append(compared(exact, logits, new).kl)
    means = [fmean(found) for found in errors]
    by_depth = means[len(SHARES) :]
    curve = falling([(0.0, by_depth[0]), *zip(SHARES, means, strict=False), (1.0, 0.0)])
    return Profile("", "float32", sensitivities(depths, by_depth), curve)


def study(
    subject: Subject,
    source: Questions,
    items: int,
    budget: float,
    *,
    calibration_items: int = 12,
    seed: int = 0,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> tuple[Groups, Profile]:
    """Compare schedules with the unmodified decoder, on the same prompts."""
    rng = np.random.default_rng(seed)
    rows = LlamaRows(subject.model)
    measured = measure(
        subject, rows, source, one_item_questions(source, "train", calibration_items, seed + 1), rng
    )
    found: Groups = {}
    for question in progress(one_item_questions(source, "test", items, seed + 1)):
        contexts = [recorded(subject, rows, source, another(source, question, rng)) for _ in range(CONTEXTS)]
        item = Item.stack([context for _, context, _ in contexts])
        for settings in PROMPTS.values():
            new, _, exact = recorded(subject, rows, source, source.ask_again(question, rng, **settings))
            for name, schedule in schedules(new.length, rows, budget, measured).items():
                cost = schedule.cost(new.length, rows.key_value_share)
                for donor, (count, fit) in DONORS.items():
                    logits = rows.reuse(new.embeds, new.start, item.first(count), new.last, schedule, fit)
                    own = found.setdefault(donor, {}).setdefault(name, [])
                    own.append(Answer(compared(exact, logits, new), cost))
    return found, measured


def main(
    model: Annotated[str, typer.Argument(help="smollm2 or photo")] = "smollm2",
    items: Annotated[int, typer.Option(min=2, help="items; each returns behind three prompts")] = 30,
    budget: Annotated[float, typer.Option(help="share of an item's token-layers")] = 0.02,
    calibration_items: Annotated[int, typer.Option(min=2, help="items to calibrate with")] = 12,
    seed: Annotated[int, typer.Option(help="seed of items and prompts")] = 0,
) -> None:
    """Compare schedules of rows over layers at equal cost."""
    with readable_errors():
        check_name(model, STUDIED)
        subject = load_subject(model, None, {"lowering": "eager"})
        found, measured = study(
            subject,
            import_module(STUDIED[model]),
            items,
            budget,
            calibration_items=calibration_items,
            seed=seed,
            progress=asking,
        )
    title = f"{model}, {items} items, three prompts each, {100 * budget:g} %"
    values = " ".join(f"{value:.2g}" for value in measured.sensitivities)
    curve = " ".join(f"{share:g}:{kl:.2g}" for share, kl in measured.error_curve)
    print_results(
        paired_table(found, "uniform", title), f"sensitivities: {values}", f"error by share: {curve}"
    )


if __name__ == "__main__":
    typer.run(main)
