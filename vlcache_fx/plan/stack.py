"""Plans of several samples as one batched plan; shorter row sets are padded by computing a row twice."""

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
        plans: one plan per sample.
        rows: L + 1 tensors [B, n]: each sample's rows, padded with its last row. Only
            one of two equal rows is read.
        keep: L tensors [B, n] of indices, as in ``Plan``.
        source: L + 1 tensors [B, N], as in ``Plan``. All samples share one donor table.
    """

    plans: tuple[Plan, ...]
    rows: tuple[Tensor, ...]
    keep: tuple[Tensor, ...]
    source: tuple[Tensor, ...]

    @property
    def rows_per_layer(self) -> tuple[int, ...]:
        """Number of rows per sample at each of the L + 1 indices."""
        return tuple(tensor.shape[1] for tensor in self.rows)


def stack_plans(plans: Sequence[Plan]) -> StackedPlan:
    """Stack plans of one model with equal numbers of tokens.

    Neighbouring layers with equal rows share their tensors, as in ``Plan``.
    """
    rows = _stacked([plan.rows for plan in plans])
    source = _stacked([plan.source for plan in plans])
    keep: list[Tensor] = []
    built: dict[tuple[int, int], Tensor] = {}
    for before, after in pairwise(rows):
        pair = (id(before), id(after))
        if pair not in built:
            built[pair] = torch.searchsorted(before, after)
        keep.append(built[pair])
    return StackedPlan(tuple(plans), tuple(rows), tuple(keep), tuple(source))


def stack_padded(tensors: Sequence[Tensor], fill: int | None = None, *, in_front: bool = False) -> Tensor:
    """Stack one-dimensional tensors; pad shorter ones with ``fill``, by default with their last entry."""
    longest = max(map(len, tensors))
    padded = []
    for tensor in tensors:
        entry = tensor[-1:] if fill is None else tensor.new_tensor([fill])
        padding = entry.expand(longest - len(tensor))
        padded.append(torch.cat([padding, tensor] if in_front else [tensor, padding]))
    return torch.stack(padded)


def _stacked(levels: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Stack the samples' tensors per level; pad shorter tensors with their last entry."""
    built: dict[tuple[int, ...], Tensor] = {}
    stacked = []
    for tensors in zip(*levels, strict=True):
        key = tuple(id(tensor) for tensor in tensors)
        if key not in built:
            built[key] = stack_padded(tensors)
        stacked.append(built[key])
    return stacked
