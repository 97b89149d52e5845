"""Plans of several samples, stacked: the same number of rows for each, by computing some rows twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vlcache_fx.plan.types import Plan


@dataclass(frozen=True)
class StackedPlan:
    """Plans of B samples of N tokens each.

    Attributes:
        plans: one per sample.
        rows: L + 1 tensors [B, n]: each sample's rows, the last row repeated where another sample has more. A
            row that is computed twice has equal values, and is read once.
        keep: L tensors [B, n] of indices; as in ``Plan``.
        source: L + 1 tensors [B, N]; as in ``Plan``. Values v >= 0 are rows of a donor table for all samples.
    """

    plans: tuple[Plan, ...]
    rows: tuple[Tensor, ...]
    keep: tuple[Tensor, ...]
    source: tuple[Tensor, ...]

    @property
    def rows_per_layer(self) -> tuple[int, ...]:
        """Number of rows at each of the L + 1 indices, of every sample."""
        return tuple(tensor.shape[1] for tensor in self.rows)


def stack_plans(plans: Sequence[Plan]) -> StackedPlan:
    """Stack plans of one model and one number of tokens.

    Neighbouring layers with the same rows share their tensors, as in ``Plan``.
    """
    rows = _stacked([plan.rows for plan in plans])
    source = _stacked([plan.source for plan in plans])
    keep: list[Tensor] = []
    made: dict[tuple[int, int], Tensor] = {}
    for before, after in pairwise(rows):
        pair = (id(before), id(after))
        if pair not in made:
            made[pair] = torch.searchsorted(before, after)
        keep.append(made[pair])
    return StackedPlan(tuple(plans), tuple(rows), tuple(keep), tuple(source))


def _stacked(levels: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Per level, the samples' tensors, stacked; shorter tensors are filled up with their last entry."""
    made: dict[tuple[int, ...], Tensor] = {}
    stacked = []
    for tensors in zip(*levels, strict=True):
        key = tuple(id(tensor) for tensor in tensors)
        if key not in made:
            longest = max(len(tensor) for tensor in tensors)
            made[key] = torch.stack([_filled(tensor, longest) for tensor in tensors])
        stacked.append(made[key])
    return stacked


def _filled(tensor: Tensor, length: int) -> Tensor:
    return tensor if len(tensor) == length else torch.cat([tensor, tensor[-1:].expand(length - len(tensor))])
