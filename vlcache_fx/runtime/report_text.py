"""Reports as a line of text, and as HTML for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from vlcache_fx.runtime.html_table import html_table


def summary(report: Mapping[str, Any]) -> str:
    """Return a report in one line: mode, tokens, and what was reused or why nothing was."""
    parts = [f"{report['mode']}: {report['num_tokens']:,} tokens"]
    if report["num_samples"] > 1:
        parts[0] += f" in each of {report['num_samples']} prompts"
    spans = report["spans"]
    if report["mode"] == "warm":
        hits = [span for span in spans if span["hit"]]
        parts.append(
            f"{sum(span['length'] for span in hits):,} in {len(hits)} of {_count(len(spans), 'span')} reused"
        )
        parts.append(f"{100 * report['token_layer_fraction']:.1f} % of them recomputed")
        if report["prefix_tokens"]:
            parts.append(f"{report['prefix_tokens']:,} in an exact prefix")
    else:
        parts += [_count(len(spans), "span")] if spans else []
        parts.append(str(report["reason"]))
    elapsed_ms = sum(report["timings_ms"].values())
    return ", ".join(parts) + (f", {elapsed_ms:.1f} ms" if elapsed_ms else "")


def as_html(report: Mapping[str, Any]) -> str:
    """Return a report as two tables, one row per span in the second."""
    fields = {
        "mode": report["mode"],
        "reason": report["reason"],
        "tokens": f"{report['num_tokens']:,}",
        "exact prefix": f"{report['prefix_tokens']:,}" if report["prefix_tokens"] else None,
        "recomputed": f"{100 * report['token_layer_fraction']:.1f} %" if report["mode"] == "warm" else None,
        "rows per layer": ", ".join(map(str, report["rows_per_layer"])),
        "encoder": {True: "reused", False: "ran", None: None}[report["encoder_hit"]],
        "milliseconds": ", ".join(f"{name} {value:.1f}" for name, value in report["timings_ms"].items()),
    }
    shown = {name: value for name, value in fields.items() if value}
    html = _table([], ((name, value) for name, value in shown.items()))
    if report["spans"]:
        headings = ("span", "start", "length", "reused", "tier", "contexts", "why not")
        rows = (
            (
                index,
                span["start"],
                span["length"],
                "yes" if span["hit"] else "no",
                span["donor_tier"] or "",
                span["donor_contexts"] or "",
                span["miss_reason"] or "",
            )
            for index, span in enumerate(report["spans"])
        )
        html += _table(headings, rows)
    return html


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return html_table(headings, ([escape(str(cell)) for cell in row] for row in rows))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
