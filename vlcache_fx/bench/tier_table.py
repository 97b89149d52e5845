"""What the bench of tiers found, as plain data and as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from rich.table import Table

from vlcache_fx.bench.machine import Machine, machine_line
from vlcache_fx.bench.rounds import Summary
from vlcache_fx.bench.systems import Variant

HEADINGS = ("request", "median", "spread", "beside memory", "cold / this", "plain / this")


@dataclasses.dataclass(frozen=True)
class TierRow:
    """Times of one kind of request.

    Attributes:
        name: what answers it.
        seconds: one value per round.
        beside: name of the row with the same request answered from memory; empty for none.
        cold: name of the row with the same request without donors; empty for none.
        donor_bytes: bytes of the donors; 0 where there are none.
    """

    name: str
    seconds: list[float]
    beside: str = ""
    cold: str = ""
    donor_bytes: int = 0

    @property
    def summary(self) -> Summary:
        """Median and range."""
        return Summary.of(self.seconds)


@dataclasses.dataclass(frozen=True)
class TiersResult:
    """All times.

    Attributes:
        machine: where they were taken.
        model, dtype: the model.
        variant: policy and budget.
        vision_tokens, num_tokens: tokens of the requests.
        rows: the times.
        missing: what could not be measured, with the reason.
        notes: remarks.
    """

    machine: Machine
    model: str
    dtype: str
    variant: Variant
    vision_tokens: int
    num_tokens: int
    rows: list[TierRow]
    missing: dict[str, str]
    notes: list[str]

    def row(self, name: str) -> TierRow | None:
        """Return a row by name."""
        return next((row for row in self.rows if row.name == name), None)

    def ratio(self, above: str, below: str) -> float | None:
        """Return the ratio of two rows' medians; None if one is missing."""
        first, second = self.row(above), self.row(below)
        return None if first is None or second is None else first.summary.median / second.summary.median


def cells(result: TiersResult) -> Iterator[tuple[str, ...]]:
    """Yield the lines of the table; see ``HEADINGS``."""
    for row in result.rows:
        summary = row.summary
        ratios = (
            result.ratio(row.name, row.beside),
            result.ratio(row.cold, row.name),
            result.ratio("plain", row.name) if row.cold == "cold" else None,  # the same request
        )
        yield (
            row.name,
            f"{1e3 * summary.median:,.0f} ms",
            f"{1e3 * summary.low:,.0f} to {1e3 * summary.high:,.0f}",
            *("" if value is None else f"{value:.2f}x" for value in ratios),
        )
    for name, reason in result.missing.items():
        yield (name, "missing", reason, "", "", "")


def remarks(result: TiersResult) -> list[str]:
    """Return the lines under the table."""
    size = next((row.donor_bytes for row in result.rows if row.donor_bytes), 0)
    return [
        f"{result.model}, {result.dtype}, {result.vision_tokens:,} vision tokens of {result.num_tokens:,}, "
        f"{result.variant.policy} at {100 * result.variant.budget:g} %; donors of {size / 2**20:,.1f} MiB.",
        f"{machine_line(result.machine)}.",
        *result.notes,
    ]


def table(result: TiersResult) -> Table:
    """Create a table for the console."""
    made = Table(title="Time to first token by tier", title_style="bold")
    for number, heading in enumerate(HEADINGS):
        made.add_column(heading, justify="right" if number else "left")
    for line in cells(result):
        made.add_row(*line)
    return made


def markdown(result: TiersResult) -> str:
    """Return the table and the remarks in Markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    lines += ["| " + " | ".join(line) + " |" for line in cells(result)]
    return "\n".join([*lines, "", *remarks(result)])
