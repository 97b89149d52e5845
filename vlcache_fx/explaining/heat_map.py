"""Which rows each layer computes: a heat map of tokens x layers, small for prompts of any length."""

from __future__ import annotations

from collections.abc import Sequence

from vlcache_fx.runtime.observation import Ranges

MOST_COLUMNS, MOST_ROWS = 160, 64
SHADES = 8
"""Number of shades of a cell that is computed in part."""


def shares(rows: Sequence[Ranges], num_tokens: int, columns: int, most_rows: int) -> list[list[float]]:
    """Return the computed share of each cell, layer by layer, each in [0, 1].

    Args:
        rows: computed tokens of each layer.
        num_tokens: number of tokens.
        columns: number of columns, at most ``num_tokens``.
        most_rows: largest number of rows; of more layers, consecutive ones share a row, by their mean.
    """
    edges = [column * num_tokens // columns for column in range(columns + 1)]
    found: dict[Ranges, list[float]] = {}
    for ranges in rows:
        if ranges not in found:
            found[ranges] = _of_layer(ranges, edges)
    size = -(-len(rows) // most_rows) if rows else 1
    groups = [rows[first : first + size] for first in range(0, len(rows), size)]
    return [
        [sum(cell) / len(group) for cell in zip(*(found[r] for r in group), strict=True)] for group in groups
    ]


def _of_layer(ranges: Ranges, edges: Sequence[int]) -> list[float]:
    counts = [0] * (len(edges) - 1)
    column = 0
    for start, end in ranges:
        while edges[column + 1] <= start:
            column += 1
        at = column
        while at < len(counts) and edges[at] < end:
            counts[at] += min(end, edges[at + 1]) - max(start, edges[at])
            at += 1
    return [have / (edges[at + 1] - edges[at]) for at, have in enumerate(counts)]


def svg(rows: Sequence[Ranges], num_tokens: int) -> str:
    """Return the heat map as SVG: a path per shade, of the classes ``shade-1`` to ``shade-8``."""
    columns = min(num_tokens, MOST_COLUMNS)
    cells = shares(rows, num_tokens, columns, MOST_ROWS)
    paths: dict[int, list[str]] = {}
    for y, line in enumerate(cells):
        shades = [-(-round(share * 1000) * SHADES // 1000) for share in line]
        start = 0
        for x in range(1, columns + 1):
            if x == columns or shades[x] != shades[start]:
                if shades[start]:
                    paths.setdefault(shades[start], []).append(f"M{start} {y}h{x - start}v1h-{x - start}z")
                start = x
    drawn = "".join(f'<path class="shade-{shade}" d="{"".join(paths[shade])}"/>' for shade in sorted(paths))
    return (
        f'<svg class="heat" role="img" aria-label="computed rows of each layer" viewBox="0 0 {columns} '
        f'{len(cells)}" preserveAspectRatio="none" style="height:{max(48, min(360, 8 * len(cells)))}px">'
        f"{drawn}</svg>"
    )


def blocks(rows: Sequence[Ranges], num_tokens: int, columns: int = 80, most_rows: int = 24) -> list[str]:
    """Return the heat map as lines of text, from a dot (nothing computed) to a full block (everything)."""
    cells = shares(rows, num_tokens, min(columns, num_tokens), most_rows)
    return ["".join("·░▒▓█"[-(-round(share * 1000) * 4 // 1000)] for share in line) for line in cells]
