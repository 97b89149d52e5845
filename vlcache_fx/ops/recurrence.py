"""``torch.ops.vlcache.recur``: a recurrent layer that is linear in its state.

The state S [dk, dv] of a head passes from row to row, with D = exp(g)::

    with beta:     S = D S;  S = S + beta k (v - S^T k)^T    gated delta rule (arXiv 2412.06464, 2510.26692)
    without beta:  S = D S + k v^T                           gated linear attention, Mamba 2 (2405.21060)
    out = scale S^T q

So rows map the state before them to the state after them by ``A S + B``. *Jumps* apply such maps between
rows, instead of rows that are reused; *records* return them, for ranges of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.ops.chunked import recur_chunked, without_records
from vlcache_fx.ops.native import define_operator
from vlcache_fx.ops.recurrence_reference import expand_heads, recur_reference, step

__all__ = ["recur"]

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

MAX_FLA_DIM = 256
"""Limit of fla's kernels for dk."""


def recur(
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
    """Compute a recurrent layer, in float32 (float64 if q is), and the states and maps that donors keep.

    Args:
        q: [batch, rows, groups, dk]; heads are a multiple of groups, as in grouped-query attention.
        k: [batch, rows, groups, dk].
        v: [batch, rows, heads, dv].
        g: log decay, at most 0: [batch, rows, heads], or [batch, rows, heads, dk] (per key channel).
        beta: [batch, rows, heads], or None: no delta rule.
        state: state before the first row [batch, heads, dk, dv], or None: zeros.
        jump_at: int64 [batch, jumps], ascending: each jump is made before this row; ``rows``: after the last.
        jump_map: int64 [batch, jumps]: index into the maps; negative: no jump. Jumps before the same row
            follow each other.
        map_a: A of maps [maps, heads, dk, dk].
        map_b: B of maps [maps, heads, dk, dv].
        start: int64 [batch, records]: first rows of the records; equal to ``end``: only a state is wanted.
        end: int64 [batch, records].
        num_rows: int64 [batch]: later rows are padding, which leaves the state as it is; or None: no padding.
        scale: factor of the outputs; None: dk ** -0.5.
        l2norm: normalise q and k over dk, as transformers does (``x * rsqrt(sum(x * x) + 1e-6)``).

    Returns:
        - outputs [batch, rows, heads, dv], in the dtype of q; zeros for padding.
        - the state after all rows and jumps [batch, heads, dk, dv].
        - states after row ``end - 1`` of each record, before a jump there [batch, records, heads, dk, dv].
        - A of each record's rows [batch, records, heads, dk, dk].
        - B of each record's rows [batch, records, heads, dk, dv].

        Without ``start`` and ``end``, there are 0 records.

    Raises:
        PlanError: a row is out of bounds, jumps are not in order, or a jump lies inside a record's rows.
    """
    with _without_autocast(q.device.type):
        if all(x is None for x in (jump_at, start, num_rows)):
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            if q.shape[1] == 1:
                return _one_row(q, k, v, g, beta, state, scale, l2norm)
            kernel = _fla_kernel(q, g, beta)
            if kernel is not None:
                options = {"use_qk_l2norm_in_kernel": l2norm, "output_final_state": True}
                out, final = kernel(q, k, v, g, beta, scale=scale, initial_state=state, **options)
                return out.to(q.dtype), *without_records(final.float())
        # The chunked implementation writes in place; the other one is slow, but has gradients.
        has_gradients = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (q, k, v, g, beta, state, map_a, map_b)
        )
        implementation = recur_reference if has_gradients else recur_chunked
        return implementation(
            q, k, v, g, beta, state, jump_at, jump_map, map_a, map_b, start, end, num_rows,
            scale=scale, l2norm=l2norm,
        )  # fmt: skip


def _fake(
    q: Tensor,
    k: Tensor,  # noqa: ARG001 (the schema)
    v: Tensor,
    g: Tensor,  # noqa: ARG001
    beta: Tensor | None = None,  # noqa: ARG001
    state: Tensor | None = None,  # noqa: ARG001
    jump_at: Tensor | None = None,  # noqa: ARG001
    jump_map: Tensor | None = None,  # noqa: ARG001
    map_a: Tensor | None = None,  # noqa: ARG001
    map_b: Tensor | None = None,  # noqa: ARG001
    start: Tensor | None = None,
    end: Tensor | None = None,  # noqa: ARG001
    num_rows: Tensor | None = None,  # noqa: ARG001
    *,
    scale: float | None = None,  # noqa: ARG001
    l2norm: bool = False,  # noqa: ARG001
) -> Results:
    batch, _, heads, width = v.shape
    dim = q.shape[-1]
    records = 0 if start is None else start.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    final = q.new_empty((batch, heads, dim, width), dtype=wide)
    states, maps_a, maps_b = (
        q.new_empty((batch, records, heads, dim, size), dtype=wide) for size in (width, dim, width)
    )
    return q.new_empty(v.shape), final, states, maps_a, maps_b


define_operator(recur, _fake, has_gradients=True)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return a context in which products of float32 tensors stay in float32."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _one_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    state: Tensor | None,
    scale: float,
    l2norm: bool,
) -> Results:
    """Compute one row per sample, as decoding does."""
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k = (expand_heads(x.to(wide), v.shape[2], l2norm) for x in (q, k))
    if state is None:
        state = q.new_zeros(*v.shape[:1], *v.shape[2:3], q.shape[-1], v.shape[-1])
    k, v, g = (x[:, 0].to(wide) for x in (k, v, g))
    state = step(state.to(wide).contiguous(), k, v, g, None if beta is None else beta[:, 0].to(wide))
    out = (q[:, 0] * scale).unsqueeze(-2) @ state
    return out.squeeze(-2).unsqueeze(1).to(dtype), *without_records(state)


def _fla_kernel(q: Tensor, g: Tensor, beta: Tensor | None) -> Callable[..., Any] | None:
    """Return fla's kernel if it is installed and computes the same to the precision of the inputs."""
    is_half = q.dtype in (torch.float16, torch.bfloat16)  # in float32, fla multiplies in TF32
    if not (q.is_cuda and is_half and beta is not None and g.dim() == 3 and q.shape[-1] <= MAX_FLA_DIM):
        return None
    return _import_fla_kernel()


@functools.cache
def _import_fla_kernel() -> Callable[..., Any] | None:
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    kernel: Callable[..., Any] = chunk_gated_delta_rule
    return kernel
