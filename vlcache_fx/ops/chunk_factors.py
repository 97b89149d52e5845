"""What the rows of a recurrence do to a state, chunk by chunk, as matrices.

Within a chunk of C rows that the state S enters, with G the cumulative log decay, the delta rule solves a
triangular system for the values that each row writes (the UT transform of arXiv 2406.06484; with decay
arXiv 2412.06464, with decay per key channel arXiv 2510.26692)::

    (I + diag(beta) (K K^T * decay)) W = diag(beta) (V - exp(G) K S)
    out = exp(G) Q S + (Q K^T * decay) W
    S_out = exp(G_C) S + K^T (exp(G_C - G) W)

Without beta, W = V. All of it that does not depend on S is computed for many chunks at once.

Only differences of G that are at most 0 are exponentiated, so strong decay gives zeros, never infinities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ChunkFactors", "chunk_factors", "normalize"]

LOG_ZERO = -60.0
"""Log decays up to here count as zero. Products of such small factors would be denormal numbers, which slow
processors down; float32 shows nothing that is as much smaller than the rest."""

EPSILON = 1e-6
"""Of the L2 norm, as in transformers and in fla."""


@dataclass(frozen=True)
class ChunkFactors:
    """Matrices of n chunks of C rows; heads that share keys form a group of r.

    Attributes:
        read: keys (only for the delta rule), then scaled queries [n, groups, 2 C or C, dk].
        write: transposed keys [n, groups, dk, C].
        scores: what each row reads of earlier rows' values [n, heads, C, C].
        solve: inverse of the triangular system times beta [n, heads, C, C]; None without beta.
        row_decay: decay from the chunk's start to each row [n, groups, r, C, 1]; None if in ``read``.
        rest_decay: decay from each row to the chunk's end [n, groups, r, C, 1]; None if in ``write``.
        decay: decay of the state over the chunk [n, groups, dk or 1, r, 1].
    """

    read: Tensor
    write: Tensor
    scores: Tensor
    solve: Tensor | None
    row_decay: Tensor | None
    rest_decay: Tensor | None
    decay: Tensor

    def of_groups(self, groups: Tensor, ratio: int) -> ChunkFactors:
        """Return the factors of some groups of ``ratio`` heads each."""
        heads = (groups[:, None] * ratio + torch.arange(ratio, device=groups.device)).flatten()

        def taken(x: Tensor | None, index: Tensor) -> Any:
            return None if x is None else x.index_select(1, index)

        return ChunkFactors(
            taken(self.read, groups),
            taken(self.write, groups),
            taken(self.scores, heads),
            taken(self.solve, heads),
            taken(self.row_decay, groups),
            taken(self.rest_decay, groups),
            taken(self.decay, groups),
        )


def normalize(x: Tensor) -> Tensor:
    """Divide by the L2 norm over the last dimension."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPSILON)


def chunk_factors(
    q: Tensor, k: Tensor, g: Tensor, beta: Tensor | None, scale: float, l2norm: bool
) -> ChunkFactors:
    """Compute the factors of chunks.

    Args:
        q: [batch, n, C, groups, dk].
        k: [batch, n, C, groups, dk].
        g: [batch, n, C, heads], or [batch, n, C, heads, dk] with as many groups as heads.
        beta: [batch, n, C, heads], or None.
        scale: factor of the outputs.
        l2norm: normalise q and k.

    Returns:
        factors in float32, or float64 if q is; groups and heads of all samples in one dimension.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, chunks, size, groups, dim = q.shape
    rows = torch.empty(chunks, batch * groups, 2 * size, dim, dtype=wide, device=q.device)
    halves = rows.view(chunks, batch, groups, 2, size, dim)
    halves[..., 0, :, :] = k.permute(1, 0, 3, 2, 4)
    halves[..., 1, :, :] = q.permute(1, 0, 3, 2, 4)
    if l2norm:
        rows.mul_(torch.rsqrt((rows * rows).sum(-1, keepdim=True) + EPSILON))
    queries = rows[:, :, size:].mul_(scale)
    keys = rows[:, :, :size]
    if g.dim() == 5:
        read, write, products, decay = _channel_decay(rows, g)
        row_decay = rest_decay = None
    else:
        read, write = rows, keys.transpose(-1, -2)
        products, row_decay, rest_decay, decay = _head_decay(rows, g, groups)
    scores = products[:, :, 1]
    if beta is None:
        read = queries if read is rows else read[:, :, size:]
        return ChunkFactors(read, write, scores, None, row_decay, rest_decay, decay)
    weights = beta.to(wide).permute(1, 0, 3, 2).reshape(chunks, -1, size)
    system = products[:, :, 0] * weights.unsqueeze(-1)
    # The inverse costs less than solving for values, and its product with them less than either.
    solve = torch.linalg.solve_triangular(system, torch.diag_embed(weights), upper=False, unitriangular=True)
    solve = F.hardshrink(solve, math.exp(LOG_ZERO))
    return ChunkFactors(read, write, scores, solve, row_decay, rest_decay, decay)


def _head_decay(rows: Tensor, g: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``products`` [n, heads, 2, C, C], and the decays of ``ChunkFactors``, for a decay per head."""
    chunks, pairs, _, _ = rows.shape
    batch, _, size, heads = g.shape
    # float64, because differences of large sums would lose the small decays between them.
    total = g.double().permute(1, 0, 3, 2).cumsum(-1)
    later = torch.full((size, size), -math.inf, dtype=rows.dtype, device=g.device).triu(1)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(rows.dtype).add_(later)
    between = _exp(between).view(chunks, pairs, heads // groups, 1, size, size)
    products = (rows @ rows[:, :, :size].transpose(-1, -2)).view(chunks, pairs, 1, 2, size, size)
    last = total[..., -1:]

    def per_row(logs: Tensor) -> Tensor:
        return _exp(logs.to(rows.dtype)).view(chunks, pairs, heads // groups, -1, 1)

    decay = per_row(last).transpose(2, 3)
    products = (products * between).view(chunks, batch * heads, 2, size, size)
    return products, per_row(total), per_row(last - total), decay


def _channel_decay(rows: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``read``, ``write``, ``products`` [n, heads, 2, C, C] and ``decay`` for a decay per channel."""
    chunks, heads, double, dim = rows.shape
    size = double // 2
    total = g.double().permute(1, 0, 3, 2, 4).cumsum(-2).view(chunks, heads, size, dim)
    last = total[..., -1:, :]
    halves = rows.view(chunks, heads, 2, size, dim)
    read = (halves * _exp(total.to(rows.dtype)).unsqueeze(2)).view_as(rows)
    write = (halves[:, :, 0] * _exp((last - total).to(rows.dtype))).transpose(-1, -2)
    decay = _exp(last.to(rows.dtype)).transpose(-1, -2).unsqueeze(-1)
    return read, write, _channel_products(halves, total), decay


def _channel_products(halves: Tensor, total: Tensor) -> Tensor:
    """Return the products of rows with earlier keys, decayed per channel from the key's row to the other.

    A chunk is halved again and again. The decay from a row of a first half to a row of the second is the
    product of two that are at most 1, to the second half's first row and from there, so matrix products do.

    Args:
        halves: keys and queries [n, heads, 2, C, dk].
        total: cumulative log decay [n, heads, C, dk].

    Returns:
        [n, heads, 2, C, C], zero for later keys; for keys also on the diagonal.
    """
    chunks, heads, _, size, _ = halves.shape
    padded = 1 << (size - 1).bit_length()
    halves = F.pad(halves, (0, 0, 0, padded - size))
    total = torch.cat([total, total[..., -1:, :].expand(-1, -1, padded - size, -1)], -2)
    products = halves.new_zeros(chunks, heads, 2, padded, padded)
    products[:, :, 1].diagonal(dim1=-2, dim2=-1).copy_((halves[:, :, 0] * halves[:, :, 1]).sum(-1))
    step = 1
    while step < padded:
        split = (padded // (2 * step), 2, step)
        own_total = torch.unflatten(total, -2, split)
        first, second = own_total[..., 0, :, :], own_total[..., 1, :, :]
        middle = second[..., :1, :]
        earlier = torch.unflatten(halves[:, :, 0], -2, split)[..., 0, :, :]
        earlier = earlier * _exp((middle - first).to(halves.dtype))
        later = torch.unflatten(halves, -2, split)[..., 1, :, :]
        later = later * _exp((second - middle).to(halves.dtype)).unsqueeze(2)
        # Keys and queries of a half are rows of one product.
        later = later.transpose(2, 3).flatten(3, 4)
        product = torch.unflatten(later @ earlier.transpose(-1, -2), 3, (2, step))
        blocks = products.view(chunks, heads, 2, split[0], 2 * step, split[0], 2 * step)
        target = blocks.diagonal(dim1=3, dim2=5)[..., step:, :step, :]
        target.copy_(product.permute(0, 1, 3, 4, 5, 2))
        step *= 2
    return products[..., :size, :size]


def _exp(logs: Tensor) -> Tensor:
    """Return exp, with 0 up to ``LOG_ZERO``."""
    return F.threshold(logs, LOG_ZERO, -math.inf).exp_()
