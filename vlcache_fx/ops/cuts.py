"""Where the rows of a recurrence are cut: by jumps, and by the ends of recorded rows.

Plain data on the host, read once per call from small integer tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from vlcache_fx.errors import PlanError

__all__ = ["Cuts", "read_cuts"]


@dataclass(frozen=True)
class Cuts:
    """The cuts of one sample.

    Attributes:
        rows: number of rows that change the state; later rows are padding.
        jumps: (row, index of its map) of each jump, in order.
        ranges: (start, end) of each record.
    """

    rows: int
    jumps: tuple[tuple[int, int], ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()

    def segments(self, tokens: int) -> list[tuple[int, int]]:
        """Return the (first row, end) between cuts, in order; they cover ``tokens`` rows."""
        points = {0, tokens, *(row for row, _ in self.jumps)}
        points.update(point for rows in self.ranges for point in rows)
        return list(pairwise(sorted(points)))

    def jumps_at(self, row: int) -> list[int]:
        """Return the maps that apply before ``row``, in order."""
        return [index for at, index in self.jumps if at == row]

    def are_recorded(self, first: int, end: int) -> bool:
        """Return whether a range contains the rows of the segment [first, end)."""
        return any(start <= first and end <= stop for start, stop in self.ranges)


def read_cuts(
    samples: int,
    tokens: int,
    jump_at: Tensor | None,
    jump_map: Tensor | None,
    map_a: Tensor | None,
    map_b: Tensor | None,
    start: Tensor | None,
    end: Tensor | None,
    num_rows: Tensor | None,
) -> list[Cuts]:
    """Return the cuts of each sample. See ``vlcache.recur`` for the tensors.

    Raises:
        PlanError: a number of rows is not within 0 to ``tokens``, jumps are not in order, a jump lies inside
            a recorded range, or a tensor is missing.
    """
    for group in (
        {"jump_at": jump_at, "jump_map": jump_map, "map_a": map_a, "map_b": map_b},
        {"start": start, "end": end},
    ):
        missing = [name for name, tensor in group.items() if tensor is None]
        if 0 < len(missing) < len(group):
            raise PlanError(f"{', '.join(missing)} missing: {', '.join(group)} are given all or none")
    rows = [tokens] * samples if num_rows is None else num_rows.tolist()
    jumps: list[list[tuple[int, int]]] = [[] for _ in range(samples)]
    ranges: list[list[tuple[int, int]]] = [[] for _ in range(samples)]
    if jump_at is not None and jump_map is not None:
        for own, at, index in zip(jumps, jump_at.tolist(), jump_map.tolist(), strict=True):
            own.extend((row, number) for row, number in zip(at, index, strict=True) if number >= 0)
    if start is not None and end is not None:
        for pairs, first, stop in zip(ranges, start.tolist(), end.tolist(), strict=True):
            pairs.extend(zip(first, stop, strict=True))
    cuts = [Cuts(*own) for own in zip(rows, map(tuple, jumps), map(tuple, ranges), strict=True)]
    for own_cuts in cuts:
        _check(own_cuts, tokens)
    return cuts


def _check(cuts: Cuts, tokens: int) -> None:
    if not 0 <= cuts.rows <= tokens:
        raise PlanError(f"num_rows is {cuts.rows}; valid: 0 to {tokens}")
    for first, stop in cuts.ranges:
        if not 0 <= first <= stop <= tokens:
            raise PlanError(f"records of rows {first} to {stop}, of {tokens} rows")
    last = 0
    for row, _ in cuts.jumps:
        if not last <= row <= tokens:
            raise PlanError(f"a jump before row {row}; valid: {last} to {tokens}, in order")
        last = row
        inside = next((rows for rows in cuts.ranges if rows[0] < row < rows[1]), None)
        if inside is not None:
            raise PlanError(f"a jump before row {row}, inside the recorded rows {inside[0]} to {inside[1]}")
