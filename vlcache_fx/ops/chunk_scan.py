"""The sequential part of the chunked recurrence: states pass through chunk after chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from vlcache_fx.ops.chunk_factors import ChunkFactors

__all__ = ["as_columns", "as_state", "scan", "write_chunk"]


def as_columns(state: Tensor, groups: int) -> Tensor:
    """Return a copy of [batch, heads, dk, width] as [groups of all samples, dk, r * width].

    The states of heads that share keys stand side by side, so that one matrix product reads them all.
    """
    split = torch.unflatten(state, 1, (groups, -1)).transpose(2, 3)
    return split.flatten(0, 1).clone(memory_format=torch.contiguous_format).flatten(-2)


def as_state(columns: Tensor, batch: int, heads: int) -> Tensor:
    """Return the inverse of ``as_columns``."""
    ratio = heads * batch // columns.shape[0]
    split = torch.unflatten(torch.unflatten(columns, -1, (ratio, -1)), 0, (batch, -1))
    return split.transpose(2, 3).flatten(1, 2)


def scan(factors: ChunkFactors, values: Tensor, state: Tensor) -> Tensor:
    """Return the outputs of n chunks of C rows.

    Args:
        factors: those of the chunks.
        values: [n, groups, r, C, dv].
        state: [groups, dk, r * dv], overwritten by the state after the chunks.

    Returns:
        [n, groups, r, C, dv].
    """
    chunks, groups, ratio, size, width = values.shape
    solve, row_decay = factors.solve, factors.row_decay
    out = torch.empty_like(values)
    written = values.new_empty(groups, ratio, size, width)
    for i in range(chunks):
        read = torch.bmm(factors.read[i], state).view(groups, -1, ratio, width).transpose(1, 2)
        fresh = values[i]
        if solve is not None:
            stored = read[:, :, :size]
            if row_decay is None:
                torch.sub(fresh, stored, out=written)
            else:
                torch.addcmul(fresh, row_decay[i], stored, value=-1, out=written)
            fresh = torch.bmm(solve[i], written.flatten(0, 1)).view(groups, ratio, size, width)
        queried = read[:, :, -size:]
        if row_decay is None:
            out[i] = queried
        else:
            torch.mul(queried, row_decay[i], out=out[i])
        out[i].flatten(0, 1).baddbmm_(factors.scores[i], fresh.flatten(0, 1))
        write_chunk(factors, i, fresh, state)
    return out


def write_chunk(factors: ChunkFactors, i: int, fresh: Tensor, columns: Tensor) -> None:
    """Let the states in ``columns`` decay over chunk ``i``, and add the values that its rows write.

    Args:
        factors: those of several chunks.
        i: number of the chunk.
        fresh: [groups, r, C, width].
        columns: [groups, dk, r * width], overwritten.
    """
    groups, ratio, size, width = fresh.shape
    sent = fresh if factors.rest_decay is None else fresh * factors.rest_decay[i]
    columns.view(groups, -1, ratio, width).mul_(factors.decay[i])
    columns.baddbmm_(factors.write[i], sent.transpose(1, 2).reshape(groups, size, ratio * width))
