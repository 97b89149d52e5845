"""The recurrence of ``vlcache.recur`` by chunks of rows: matrix products instead of a loop over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vlcache_fx.ops.chunk_factors import chunk_factors
from vlcache_fx.ops.chunk_map import Map, RowsMap, compose, identity_map
from vlcache_fx.ops.chunk_scan import as_columns, as_state, scan
from vlcache_fx.ops.cuts import Cuts, read_cuts

__all__ = ["recur_chunked", "without_records"]

CHUNK_ROWS = {"cpu": 32, "cuda": 64}
"""Rows of a chunk. With more, the work inside of chunks grows; with fewer, that on states."""

SHORT_ROWS = 64
"""As many rows, or fewer, are one chunk: each block costs some dozens of calls."""

BLOCK_ROWS = {"cpu": 256, "cuda": 4096}
"""Rows whose factors are computed at once: on a CPU, few enough to stay in its cache."""


def recur_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    jump_at: Tensor | None = None,
    jump_map: Tensor | None = None,
    map_a: Tensor | None = None,
    map_b: Tensor | None = None,
    start: Tensor | None = None,
    end: Tensor | None = None,
    num_rows: Tensor | None = None,
    *,
    scale: float | None = None,
    l2norm: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute ``vlcache.recur``; see there."""
    batch, tokens, heads, width = v.shape
    dim = q.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = dim**-0.5 if scale is None else scale
    if g.dim() == 4 and k.shape[2] != heads:
        q, k = (x.repeat_interleave(heads // k.shape[2], 2) for x in (q, k))
    if state is None:
        state = torch.zeros(batch, heads, dim, width, dtype=wide, device=q.device)
    state = state.to(wide)
    maps = None if map_a is None or map_b is None else (map_a.to(wide), map_b.to(wide))
    cuts = read_cuts(batch, tokens, jump_at, jump_map, map_a, map_b, start, end, num_rows)
    out = (torch.empty if num_rows is None else torch.zeros)(v.shape, dtype=q.dtype, device=q.device)
    # Samples that are cut alike, as all are in a plain prefill, share their matrix products.
    parts = []
    for own in [slice(0, batch)] if len(set(cuts)) == 1 else [slice(i, i + 1) for i in range(batch)]:
        own_beta = None if beta is None else beta[own]
        rows = _Rows(q[own], k[own], v[own], g[own], own_beta, scale, l2norm, out[own])
        parts.append(rows.compute(state[own], cuts[own.start], maps))
    joined = parts[0] if len(parts) == 1 else (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    final, *records = (x.contiguous() for x in joined)
    return out, final, records[0], records[1], records[2]


def without_records(state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a final state [batch, heads, dk, dv], and the states and maps of no records."""
    batch, heads, dim, width = state.shape
    states, maps_a, maps_b = (state.new_empty(batch, 0, heads, dim, size) for size in (width, dim, width))
    return state, states, maps_a, maps_b


@dataclass(frozen=True)
class _Rows:
    """The rows of samples that are cut alike, and ``out``, which is written; as in ``vlcache.recur``."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor | None
    scale: float
    l2norm: bool
    out: Tensor

    def compute(self, state: Tensor, cuts: Cuts, maps: Map | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the final state, and the states and maps of records.

        Args:
            state: [samples, heads, dk, dv]; not written to.
            cuts: those of each sample.
            maps: what jumps apply, [maps, heads, dk, dk] and [maps, heads, dk, dv].
        """
        tokens, entering = self.out.shape[1], state
        states = [state] * len(cuts.ranges)
        found: list[Map | None] = [None] * len(cuts.ranges)
        for first, end in [*cuts.segments(tokens), (tokens, tokens)]:
            states = [
                state if stop == first else kept for kept, (_, stop) in zip(states, cuts.ranges, strict=True)
            ]
            for index in cuts.jumps_at(first):
                assert maps is not None  # comes with every jump
                state = maps[0][index] @ state + maps[1][index]
            last = min(end, cuts.rows)
            if first >= last:
                continue
            state, own = self._segment(state, first, last, cuts.are_recorded(first, end))
            if own is not None:
                found = [
                    compose(own, earlier) if start <= first and end <= stop else earlier
                    for earlier, (start, stop) in zip(found, cuts.ranges, strict=True)
                ]
        if state is entering:  # results of operators share no memory with inputs
            state = state.clone()
        if not found:
            return without_records(state)
        nothing = identity_map(state)
        pairs = [nothing if pair is None else pair for pair in found]
        maps_a, maps_b = (torch.stack(tensors, 1) for tensors in zip(*pairs, strict=True))
        return state, torch.stack(states, 1), maps_a, maps_b

    def _segment(self, state: Tensor, first: int, end: int, has_map: bool) -> tuple[Tensor, Map | None]:
        """Write ``out`` of the rows from ``first`` to ``end``; return the state after them, and their map."""
        batch, heads, _, width = state.shape
        groups = self.k.shape[2]
        columns = as_columns(state, groups)
        rows_map = RowsMap.of_no_rows(state, groups, self.beta is not None) if has_map else None
        for low, high, size in _blocks(first, end, state.device.type):
            shape = (-1, size)
            q, k, v, g = (torch.unflatten(x[:, low:high], 1, shape) for x in (self.q, self.k, self.v, self.g))
            beta = None if self.beta is None else torch.unflatten(self.beta[:, low:high], 1, shape)
            factors = chunk_factors(q, k, g, beta, self.scale, self.l2norm)
            values = state.new_empty(v.shape[1], batch, heads, size, width).copy_(v.permute(1, 0, 3, 2, 4))
            values = values.view(-1, batch * groups, heads // groups, size, width)
            out = scan(factors, values, columns).view(-1, batch, heads, size, width)
            torch.unflatten(self.out[:, low:high], 1, shape).copy_(out.permute(1, 0, 3, 2, 4))
            rows_map = None if rows_map is None else rows_map.after(factors, values)
        state = as_state(columns, batch, heads)
        return state, None if rows_map is None else rows_map.matrices(state, columns)


def _blocks(first: int, end: int, device_type: str) -> Iterator[tuple[int, int, int]]:
    """Yield (first row, end, rows of a chunk) of blocks: of whole chunks, or of a shorter one at the end."""
    size, step = (rows.get(device_type, rows["cuda"]) for rows in (CHUNK_ROWS, BLOCK_ROWS))
    size = end - first if end - first <= SHORT_ROWS else size
    whole = end - (end - first) % size
    for low in range(first, whole, step):
        yield low, min(low + step, whole), size
    if whole < end:
        yield whole, end, end - whole
