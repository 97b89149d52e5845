"""Comparisons of alternatives on the same prompts, in pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.table import Table

from vlcache_fx.fidelity.compare import Comparison, average, difference, proportion
from vlcache_fx.fidelity.table import nats, percent


@dataclass(frozen=True)
class Answer:
    """One comparison, and the work in the item's rows as a share of all."""

    compared: Comparison
    cost: float


Groups = dict[str, dict[str, list[Answer]]]
"""Group, alternative -> answers, in equal order."""


def paired_table(groups: Mapping[str, Mapping[str, Sequence[Answer]]], base: str, title: str) -> Table:
    """Create a table with one row per group and alternative; each is compared with ``base`` of its group."""
    table = Table("donor", "what", "cost", "KL (nats)", f"minus {base}", "same answer", title=title)
    for group, alternatives in groups.items():
        of_base = [answer.compared.kl for answer in alternatives[base]]
        for name, answers in alternatives.items():
            kls = [answer.compared.kl for answer in answers]
            table.add_row(
                group,
                name,
                f"{100 * fmean(answer.cost for answer in answers):.2f} %",
                nats(average(kls)),
                "" if name == base else nats(difference(kls, of_base)),
                percent(proportion([answer.compared.agrees for answer in answers])),
            )
        table.add_section()
    return table
