"""The tokens of a prompt as a bar and as text, in HTML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby

from vlcache_fx.explaining.explained_call import SampleExplanation
from vlcache_fx.explaining.tokens import MEDIA, TokenRange, by_column, count

MOST_COLUMNS = 800
MOST_TEXTS = 120
"""Tokens of text in a row that are shown; of more, the first and the last."""


def bar(ranges: Sequence[TokenRange]) -> str:
    """Return the ranges as a bar in SVG."""
    columns = min(MOST_COLUMNS, ranges[-1].end)
    drawn = "".join(
        f'<rect class="{run.kind.value}" x="{run.start}" width="{run.length}" height="1"/>'
        for run in by_column(ranges, columns)
    )
    return (
        f'<svg class="bar" role="img" aria-label="tokens by class" viewBox="0 0 {columns} 1" '
        f'preserveAspectRatio="none">{drawn}</svg>'
    )


def flow(sample: SampleExplanation) -> str:
    """Return the prompt: text token by token, each image as a box with its counts."""
    parts: list[str] = []
    for is_media, group in groupby(sample.ranges, key=lambda run: run.kind in MEDIA):
        ranges = list(group)
        parts.append(_image(ranges) if is_media else "".join(_text(run, sample.texts) for run in ranges))
    return f'<div class="flow">{"".join(parts)}</div>'


def _image(ranges: Sequence[TokenRange]) -> str:
    first = ranges[0].start
    moved = [TokenRange(run.kind, run.start - first, run.end - first) for run in ranges]
    counts = ", ".join(
        f'<b class="{kind.value}">{number:,}</b> {escape(kind.label.removeprefix("image, "))}'
        for kind, number in count(ranges).items()
    )
    total = ranges[-1].end - first
    return f'<span class="image">{bar(moved)}image, {total:,} tokens: {counts}</span>'


def _text(run: TokenRange, texts: Sequence[str]) -> str:
    """Return a run of text; without texts, as one box."""
    if not texts:
        number = f'<b class="{run.kind.value}">{run.length:,}</b>'
        return f'<span class="image">{number} {escape(run.kind.label)}</span>'
    return "".join(
        f'<span class="muted"> … {-token:,} more … </span>'
        if token < 0
        else f'<span class="t {run.kind.value}" title="token {token}">{escape(_visible(texts[token]))}</span>'
        for token in _shown(run)
    )


def _shown(run: TokenRange) -> Iterator[int]:
    """Yield the tokens that are shown, and minus the number of those that are left out."""
    if run.length <= MOST_TEXTS:
        yield from range(run.start, run.end)
        return
    half = MOST_TEXTS // 2
    yield from range(run.start, run.start + half)
    yield 2 * half - run.length
    yield from range(run.end - half, run.end)


def _visible(text: str) -> str:
    """Return a token's text with line breaks and empty texts made visible."""
    return text.replace("\r", "").replace("\n", "⏎") or "∅"
