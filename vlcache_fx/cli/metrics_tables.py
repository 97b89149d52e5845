"""Tables of ``vlcache top``."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vlcache_fx.cli.metrics_summary import Count, Latency, Summary
from vlcache_fx.cli.store_access import as_size

NOTHING = "-"


def summary_tables(summary: Summary, title: str) -> RenderableType:
    """Lay out a summary.

    Args:
        summary: the numbers.
        title: the first line.
    """
    parts: list[RenderableType] = [Text(title, style="bold"), Text(_load(summary)), _calls(summary)]
    if summary.tiers:
        parts.append(_stores(summary))
    parts.append(_first_token(summary))
    return Group(*parts)


def _load(summary: Summary) -> str:
    hits = summary.hit_share
    parts = [f"spans reused: {_percent(hits.total)}"]
    if summary.seconds is not None:
        parts.append(f"in the last {summary.seconds:.1f} s: {_percent(hits.recent)}")
    if summary.running is not None and summary.waiting is not None:
        parts.append(f"requests running: {summary.running}, waiting: {summary.waiting}")
    return "; ".join(parts)


def _calls(summary: Summary) -> Table:
    table = _table("calls and tokens", "total", "per second")
    groups: tuple[tuple[str, Mapping[str, Count]], ...] = (
        ("", summary.modes),
        ("without reuse: ", summary.reasons),
        ("tokens ", summary.tokens),
    )
    for start, counts in groups:
        for name, count in counts.items():
            table.add_row(f"{start}{name}", f"{count.total:,.0f}", _rate(count))
        table.add_section()
    return table


def _stores(summary: Summary) -> Table:
    table = _table("store", "entries", "used", "bound", "hits", "per second", "evictions", "per second")
    for tier in summary.tiers:
        table.add_row(
            f"{tier.engine} {tier.tier}".strip(),
            f"{tier.entries:,}",
            as_size(tier.used_bytes),
            as_size(tier.capacity_bytes),
            f"{tier.hits.total:,.0f}",
            _rate(tier.hits),
            f"{tier.evictions.total:,.0f}",
            _rate(tier.evictions),
        )
    return table


def _first_token(summary: Summary) -> Table:
    table = _table("time to first token", "answers", "p50, ms", "p95, ms")
    rows: list[tuple[str, Latency]] = [("all", summary.first_token)]
    if summary.first_token_recent is not None and summary.seconds is not None:
        rows.append((f"last {summary.seconds:.1f} s", summary.first_token_recent))
    for name, found in rows:
        table.add_row(name, f"{found.answers:,}", _number(found.p50_ms), _number(found.p95_ms))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _rate(count: Count) -> str:
    return NOTHING if count.per_second is None else f"{count.per_second:,.1f}"


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"
