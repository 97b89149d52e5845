"""The token axis of a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from vlcache_fx.ir.sizes import equal, is_one


@dataclass(frozen=True)
class Entries:
    """Which entries an axis has: ``outer`` x tokens x ``inner`` of them, tokens in the middle.

    Attributes:
        outer, inner: 1 where every entry is a token; larger where the axis was merged with others (samples
            outside, the experts of a token inside).
        order: the sort that put the entries into another order; None where they are in their own.
    """

    outer: Any = 1
    inner: Any = 1
    order: Node | None = None

    @property
    def are_tokens(self) -> bool:
        """True where entry i is token i."""
        return is_one(self.outer) and is_one(self.inner) and self.order is None

    def same(self, other: Entries) -> bool:
        """True where the two axes have the same entries in the same order."""
        return equal(self.outer, other.outer) and equal(self.inner, other.inner) and self.order is other.order


@dataclass(frozen=True)
class TokenAxis:
    """Where a tensor runs over tokens.

    Attributes:
        dim: the dimension; None for counts over all tokens (how many were sent to each expert), which may
            only say where groups of sorted rows end.
        entries: what it holds.
        points_at: the entries that the values index; None for values that are no indices.
        is_permutation: True where the values index each of these entries once.
    """

    dim: int | None
    entries: Entries = field(default_factory=Entries)
    points_at: Entries | None = None
    is_permutation: bool = False

    def at(self, dim: int) -> TokenAxis:
        """The same axis in another dimension, of a tensor with other values."""
        return TokenAxis(dim, self.entries)

    def moved(self, dim: int) -> TokenAxis:
        """The same axis in another dimension, of the same values."""
        return replace(self, dim=dim)

    @property
    def token_dim(self) -> int:
        """``dim`` of an axis that is not counts."""
        assert self.dim is not None
        return self.dim


@dataclass(frozen=True)
class TokenFlow:
    """How tokens flow through one node.

    Attributes:
        axis: where the node's result runs over tokens.
        gathers: ``(operand, dimension)`` of operands that are not computed from the rows but have a full
            token axis there.
        size_argument: ``(argument index, position)`` of the entry of a size list that spells out the number
            of entries along the axis.
    """

    axis: TokenAxis
    gathers: tuple[tuple[Node, int], ...] = ()
    size_argument: tuple[int, int] | None = None

    @property
    def dim(self) -> int:
        """The dimension of the result that runs over tokens."""
        return self.axis.token_dim


Axes: TypeAlias = Mapping[Node, TokenAxis]


def shape_of(node: Node) -> torch.Size:
    """The shape of the node's (fake) tensor value."""
    shape: torch.Size = node.meta["val"].shape
    return shape


def rank_of(node: Node) -> int:
    """Number of dimensions."""
    return len(shape_of(node))
