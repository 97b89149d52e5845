"""The map of rows: how the state after them depends on the state before, ``S_out = A S + B``.

B is what becomes of a zero state. For the delta rule, A is what becomes of basis states when values are zero;
both pass through the chunks beside the state. B as a difference of states would lose digits wherever the
state before is large.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vlcache_fx.ops.chunk_factors import ChunkFactors
from vlcache_fx.ops.chunk_scan import as_columns, as_state, write_chunk

__all__ = ["Map", "RowsMap", "compose", "identity_map"]

NEGLIGIBLE = 1e-20
"""Elements of A up to here become zero: float32 could not show what depends on them, and their products would
be denormal soon, which slows processors down."""

Map = tuple[Tensor, Tensor]
"""A [.., heads, dk, dk] and B [.., heads, dk, dv]."""


def identity_map(state: Tensor) -> Map:
    """Return the map of no rows, for states like ``state`` [.., heads, dk, dv]."""
    identity = torch.eye(state.shape[-2], dtype=state.dtype, device=state.device)
    return identity.expand(*state.shape[:-1], -1), torch.zeros_like(state)


def compose(later: Map, earlier: Map | None) -> Map:
    """Return the map of some rows and of those before them."""
    if earlier is None:
        return later
    return later[0] @ earlier[0], later[0] @ earlier[1] + later[1]


@dataclass(frozen=True)
class RowsMap:
    """The map of the rows so far. Groups of heads whose A has become zero are left out: B is their state.

    Attributes:
        groups: which groups it has, int64.
        columns: their B and, for the delta rule, A beside it, as ``as_columns`` has them.
        decay: without a delta rule, the diagonal of A of all groups [groups, dk or 1, r, 1]; else None.
        width: dv.
    """

    groups: Tensor
    columns: Tensor
    decay: Tensor | None
    width: int

    @classmethod
    def of_no_rows(cls, state: Tensor, groups: int, has_delta_rule: bool) -> RowsMap:
        """Return the map of no rows, for states like ``state`` [batch, heads, dk, dv]."""
        batch, heads, _, width = state.shape
        a, b = identity_map(state)
        columns = as_columns(torch.cat([b, a], -1) if has_delta_rule else b, groups)
        decay = None if has_delta_rule else state.new_ones(batch * groups, 1, heads // groups, 1)
        return cls(torch.arange(batch * groups, device=state.device), columns, decay, width)

    def after(self, factors: ChunkFactors, values: Tensor) -> RowsMap:
        """Return the map of the rows so far and of the chunks that follow; reuses the memory of this map.

        Args:
            factors: those of the chunks.
            values: [n, groups, r, C, dv].
        """
        decay = None if self.decay is None else self.decay * factors.decay.prod(0)
        if self.groups.numel() == 0:
            return replace(self, decay=decay)
        _, all_groups, ratio, _, _ = values.shape
        if len(self.groups) < all_groups:
            factors = factors.of_groups(self.groups, ratio)
            values = values.index_select(1, self.groups)
        for i, own in enumerate(values):
            write_chunk(factors, i, self._written(factors, i, own), self.columns)
        if decay is None:
            a = torch.unflatten(self.columns, -1, (ratio, -1))[..., self.width :]
            a.copy_(F.hardshrink(a, NEGLIGIBLE))
            is_left = (a != 0).flatten(1).any(-1)
        else:
            is_left = (decay[self.groups] > NEGLIGIBLE).flatten(1).any(-1)
        if bool(is_left.all()):
            return replace(self, decay=decay)
        return replace(self, groups=self.groups[is_left], columns=self.columns[is_left], decay=decay)

    def _written(self, factors: ChunkFactors, i: int, values: Tensor) -> Tensor:
        """Return what the rows of chunk ``i`` write: their values to B, zeros to A, less what is stored."""
        if factors.solve is None:
            return values
        _, ratio, size, width = values.shape
        stored = torch.bmm(factors.read[i, :, :size], self.columns)
        stored = torch.unflatten(stored, -1, (ratio, -1)).transpose(1, 2)
        written = stored.neg() if factors.row_decay is None else stored * -factors.row_decay[i]
        written[..., :width] += values
        return torch.bmm(factors.solve[i], written.flatten(0, 1)).view_as(written)

    def matrices(self, state: Tensor, columns: Tensor) -> Map:
        """Return (A, B) of all groups.

        Args:
            state: the state after the rows [batch, heads, dk, dv].
            columns: the same, as ``as_columns`` has it.
        """
        batch, heads, dim, width = state.shape
        ratio = batch * heads // columns.shape[0]
        b = torch.unflatten(columns.clone(), -1, (ratio, width))
        own = torch.unflatten(self.columns, -1, (ratio, -1))
        b[self.groups] = own[..., :width]
        if self.decay is None:
            a = state.new_zeros(*b.shape[:-1], dim)
            a[self.groups] = own[..., width:]
            a = as_state(a.flatten(-2), batch, heads)
        else:
            diagonal = as_state(self.decay.expand(-1, dim, -1, -1).flatten(-2), batch, heads)
            a = torch.diag_embed(diagonal.squeeze(-1))
        return a, as_state(b.flatten(-2), batch, heads)
