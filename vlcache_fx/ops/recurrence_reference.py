"""``vlcache.recur`` token by token, straight from its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from vlcache_fx.ops.chunk_factors import normalize
from vlcache_fx.ops.chunk_map import identity_map
from vlcache_fx.ops.cuts import read_cuts

__all__ = ["expand_heads", "recur_reference", "step"]


def step(state: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None) -> Tensor:
    """Return the state after one row.

    Args:
        state: state before the row [.., heads, dk, dv].
        k: [.., heads, dk].
        v: [.., heads, dv].
        g: log decay [.., heads] or [.., heads, dk].
        beta: [.., heads], or None: no delta rule.
    """
    decay = g.exp()
    state = state * (decay.unsqueeze(-1) if g.dim() == k.dim() else decay[..., None, None])
    if beta is not None:
        v = beta.unsqueeze(-1) * (v - (k.unsqueeze(-2) @ state).squeeze(-2))
    return torch.addcmul(state, k.unsqueeze(-1), v.unsqueeze(-2))


def expand_heads(x: Tensor, heads: int, l2norm: bool) -> Tensor:
    """Return q or k [batch, rows, groups, dk] for each head, normalised with ``l2norm``."""
    x = normalize(x) if l2norm else x
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def recur_reference(
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
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (expand_heads(x.to(wide), heads, l2norm) for x in (q, k))
    v, g, beta = v.to(wide), g.to(wide), None if beta is None else beta.to(wide)
    maps = None if map_a is None or map_b is None else (map_a.to(wide), map_b.to(wide))
    out = torch.zeros_like(v)
    all_cuts = read_cuts(batch, tokens, jump_at, jump_map, map_a, map_b, start, end, num_rows)
    finals, states, maps_a, maps_b = [], [], [], []
    for b, cuts in enumerate(all_cuts):
        rows = [(k[b, t], v[b, t], g[b, t], None if beta is None else beta[b, t]) for t in range(cuts.rows)]
        own = v.new_zeros(heads, q.shape[-1], width) if state is None else state[b].to(wide)
        ends = [own] * len(cuts.ranges)
        for t in range(tokens + 1):
            ends = [own if stop == t else kept for kept, (_, stop) in zip(ends, cuts.ranges, strict=True)]
            for index in cuts.jumps_at(t):
                assert maps is not None  # they come with every jump
                own = maps[0][index] @ own + maps[1][index]
            if t < cuts.rows:
                own = step(own, *rows[t])
                out[b, t] = scale * (q[b, t].unsqueeze(-2) @ own).squeeze(-2)
        found = [_map(own, rows[first:stop]) for first, stop in cuts.ranges]
        finals.append(own)
        states.append(torch.stack([own, *ends])[1:])  # right without any as well
        maps_a.append(torch.stack([identity_map(own)[0], *(a for a, _ in found)])[1:])
        maps_b.append(torch.stack([own, *(b for _, b in found)])[1:])
    results = [torch.stack(tensors) for tensors in (finals, states, maps_a, maps_b)]
    return out.to(dtype), results[0], results[1], results[2], results[3]


def _map(state: Tensor, rows: list[tuple[Tensor, Tensor, Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
    """Return (A, B) of rows, for states like ``state``."""
    a, b = identity_map(state)
    for k, v, g, beta in rows:
        a = step(a, k, torch.zeros_like(k), g, beta)
        b = step(b, k, v, g, beta)
    return a, b
