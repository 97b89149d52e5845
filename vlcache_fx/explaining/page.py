"""The explanation as one HTML page that needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from vlcache_fx.explaining.explained_call import ExplainedCall, SampleExplanation
from vlcache_fx.explaining.graph_view import layer_section
from vlcache_fx.explaining.heat_map import svg
from vlcache_fx.explaining.numbers import (
    ago_text,
    bytes_text,
    flops_text,
    ms_text,
    rank_text,
    short_key,
    tokens_text,
)
from vlcache_fx.explaining.style import CSS
from vlcache_fx.explaining.token_view import bar, flow
from vlcache_fx.explaining.tokens import TokenClass, count
from vlcache_fx.runtime.html_table import html_table

MOST_SAMPLES = 4
"""Prompts of a batch that are drawn."""


def page(explanation: ExplainedCall) -> str:
    """Return the page."""
    title = f"vlcache: a {explanation.mode} call"
    sections = [
        _summary(explanation),
        _tokens(explanation),
        _stages(explanation),
        _donors(explanation),
        _refusals(explanation),
        *(layer_section(graph) for graph in explanation.graphs),
        _graphs(explanation),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
        f"<h1>{escape(title)}</h1>{''.join(sections)}</main></body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> str:
    """Return a table of cells in HTML; columns in ``numbers`` are aligned to the right."""
    return f'<div class="scroll">{html_table(head, rows, "stack", numbers)}</div>'


def code(text: str) -> str:
    """Return text in HTML, with names in backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _summary(explanation: ExplainedCall) -> str:
    counts, total = explanation.counts, sum(explanation.counts.values())
    reused = counts.get(TokenClass.REUSED, 0) + counts.get(TokenClass.PREFIX, 0)
    cards = [(explanation.mode, "mode")]
    if total:
        cards += [(f"{total:,}", "tokens"), (f"{reused:,}", "tokens reused")]
    if explanation.report is not None and explanation.mode == "warm" and explanation.donors:
        share = explanation.report.token_layer_fraction
        cards.append((f"{share:.1%}", "of reused images' token-layers recomputed"))
    if explanation.stages:
        cards.append((ms_text(sum(stage.ms for stage in explanation.stages)), "measured, all stages"))
    if explanation.donors:
        cards.append((bytes_text(sum(donor.nbytes for donor in explanation.donors)), "donors read"))
    shown = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{name}</span></div>' for value, name in cards
    )
    settings = ", ".join(f"{name} {value}" for name, value in explanation.settings.items())
    reason = "" if explanation.report is None else explanation.report.reason or ""
    return (
        (f'<p class="muted">{escape(settings)}</p>' if settings else "")
        + f'<div class="cards">{shown}</div>'
        + (f"<p>{escape(reason)}</p>" if reason else "")
    )


def _tokens(explanation: ExplainedCall) -> str:
    shown = [sample for sample in explanation.samples if sample.num_tokens]
    if not shown:
        return ""
    legend = "".join(
        f'<li class="{kind.value}"><i></i>{escape(kind.label)}: '
        f'<b data-count="{kind.value}">{number:,}</b></li>'
        for kind, number in explanation.counts.items()
    )
    drawn = "".join(_sample(sample, index, len(shown)) for index, sample in enumerate(shown[:MOST_SAMPLES]))
    left = len(shown) - MOST_SAMPLES
    more = f'<p class="muted">{left} more prompts are not drawn.</p>' if left > 0 else ""
    return f'<h2>Tokens and rows</h2><ul class="legend">{legend}</ul>{drawn}{more}'


def _sample(sample: SampleExplanation, index: int, number: int) -> str:
    head = ""
    if number > 1:
        own = ", ".join(f"{value:,} {kind.label}" for kind, value in count(sample.ranges).items())
        head = f"<h3>Prompt {index}: {escape(own)}</h3>"
    heat = ""
    if sample.rows:
        layers = len(sample.rows)
        heat = (
            f"<h3>Rows that each of the {layers} layers computes</h3>"
            f"{svg(sample.rows, sample.num_tokens)}"
            f'<div class="axis"><span>layer 0 at the top, layer {layers - 1} at the bottom</span>'
            f"<span>{_row_counts(sample)}</span></div>"
        )
    return (
        f"{head}{bar(sample.ranges)}"
        f'<div class="axis"><span>token 0</span><span>token {sample.num_tokens - 1:,}</span></div>'
        f"{heat}<h3>The prompt</h3>{flow(sample)}"
    )


def _row_counts(sample: SampleExplanation) -> str:
    rows = [sum(end - start for start, end in ranges) for ranges in sample.rows]
    if min(rows) == max(rows):
        return f"{rows[0]:,} rows in every layer"
    return f"{rows[0]:,} rows in layer 0, {rows[-1]:,} in the last"


def _stages(explanation: ExplainedCall) -> str:
    if not explanation.stages:
        return ""
    total = sum(stage.ms for stage in explanation.stages)
    bars = "".join(_bar(stage.name, stage.ms, total, stage.text, "") for stage in explanation.stages)
    found = explanation.predictions
    bounds = [
        ("full computation", found.full),
        ("this request", found.request),
    ]
    known = [(name, bound) for name, bound in bounds if bound is not None]
    run = next((stage.ms for stage in explanation.stages if stage.name == "run"), 0.0)
    most = max([run, *(bound.ms for _, bound in known)], default=0.0)
    predicted = "".join(
        _bar(
            f"{name}, bound",
            bound.ms,
            most,
            f"{flops_text(bound.flops)}, {bytes_text(bound.nbytes)}; limited by {bound.limited_by}",
            "bound",
        )
        for name, bound in known
    )
    if predicted:
        predicted = (
            f'<div class="bars">{predicted}{_bar("run, measured", run, most, "this request", "")}</div>'
        )
    return (
        f"<h2>Time to the first token</h2>"
        f'<p class="muted">One run, measured with the lowering {escape(explanation.lowering)}; '
        "without tracing, compilation and what the model's own code does between graphs.</p>"
        f'<div class="bars">{bars}</div>'
        "<h3>What operations and bytes alone would take in the decoder</h3>"
        f'{predicted}<p class="muted">{escape(found.note)}</p>'
    )


def _bar(name: str, ms: float, most: float, text: str, kind: str) -> str:
    width = 100 * ms / most if most else 0
    return (
        f"<span>{escape(name)}<br><small>{escape(text)}</small></span>"
        f'<div class="track {kind}"><div style="width:{width:.1f}%"></div></div>'
        f'<span class="num">{ms_text(ms)}</span>'
    )


def _donors(explanation: ExplainedCall) -> str:
    if not explanation.donors:
        return ""
    head = ("image", "donor", "tier", "contexts", "dtype", "rank", "bytes", "last used", "")
    rows = [
        (
            tokens_text(donor.start, donor.length) + (f" of prompt {donor.sample}" if donor.sample else ""),
            f"<code>{escape(short_key(donor.key))}</code>",
            escape(donor.tier),
            f"{donor.contexts}",
            escape(", ".join(donor.dtypes)),
            rank_text(donor.rank),
            bytes_text(donor.nbytes),
            ago_text(donor.unused_s),
            "exact prefix" if donor.is_exact else "",
        )
        for donor in explanation.donors
    ]
    return f"<h2>Store hits</h2>{table(head, rows, ('contexts', 'bytes'))}"


def _refusals(explanation: ExplainedCall) -> str:
    parts = []
    if explanation.refusals:
        rows = [
            (
                escape(found.subject),
                f"<code>{found.reason.value}</code>",
                escape(found.text),
                code(found.advice),
            )
            for found in explanation.refusals
        ]
        parts.append(table(("what", "reason", "why", "what to do"), rows))
    if explanation.misses:
        listed = "".join(f"<li>{escape(str(miss))}</li>" for miss in explanation.misses)
        parts.append(f"<h3>The nearest entries of the store</h3><ul>{listed}</ul>")
    return f"<h2>Not reused, and why</h2>{''.join(parts)}" if parts else ""


def _graphs(explanation: ExplainedCall) -> str:
    if not explanation.graphs:
        return ""
    rows = [(f"{index}", escape(graph.summary())) for index, graph in enumerate(explanation.graphs)]
    return f"<h2>Graphs</h2>{table(('graph', 'what becomes of it'), rows)}"
