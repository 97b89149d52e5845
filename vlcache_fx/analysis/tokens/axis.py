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
    """Entries of an axis: ``outer * tokens * inner`` of them, nested in that order.

    Two experts per token (``inner=2``) and three tokens: t0e0 t0e1 t1e0 t1e1 t2e0 t2e1.

    Attributes:
        outer, inner: sizes of axes that were merged with the token axis, such as samples outside and the
            experts of a token inside; 1 for none.
        order: the sort that reordered the entries; None if they are in their own order.
    """

    outer: Any = 1
    inner: Any = 1
    order: Node | None = None

    @property
    def are_tokens(self) -> bool:
        """True if entry i is token i."""
        return is_one(self.outer) and is_one(self.inner) and self.order is None

    def same(self, other: Entries) -> bool:
        """Return True if both axes have the same entries in the same order."""
        return equal(self.outer, other.outer) and equal(self.inner, other.inner) and self.order is other.order


@dataclass(frozen=True)
class TokenAxis:
    """Token axis of a tensor.

    Attributes:
        dim: the dimension; None for counts over all tokens (tokens per expert), which may only be the ends of
            groups of sorted rows.
        entries: the entries along it.
        points_at: the entries that the values index; None for values that are no indices.
        is_permutation: True where the values index each of these entries once.
    """

    dim: int | None
    entries: Entries = field(default_factory=Entries)
    points_at: Entries | None = None
    is_permutation: bool = False

    def at(self, dim: int) -> TokenAxis:
        """Return the axis of a tensor with new values, with the same entries along ``dim``."""
        return TokenAxis(dim, self.entries)

    def moved(self, dim: int) -> TokenAxis:
        """Return the axis of a tensor with the same values, along ``dim``."""
        return replace(self, dim=dim)

    @property
    def token_dim(self) -> int:
        """``dim``, which is not None here."""
        assert self.dim is not None
        return self.dim


@dataclass(frozen=True)
class TokenFlow:
    """How tokens flow through one node.

    Attributes:
        axis: token axis of the result.
        gathers: ``(operand, dim)`` of operands outside the residual stream that have all tokens along
            ``dim``.
        size_argument: ``(argument, index)`` of the element of a size list that is the number of entries along
            the axis.
    """

    axis: TokenAxis
    gathers: tuple[tuple[Node, int], ...] = ()
    size_argument: tuple[int, int] | None = None

    @property
    def dim(self) -> int:
        """The token dimension of the result."""
        return self.axis.token_dim


Axes: TypeAlias = Mapping[Node, TokenAxis]


def stream_dim(boundary: Node) -> int:
    """Return the token dimension of a residual stream, [.., tokens, hidden]."""
    return rank_of(boundary) - 2


def shape_of(node: Node) -> torch.Size:
    """Return the shape of the node's (fake) tensor."""
    shape: torch.Size = node.meta["val"].shape
    return shape


def rank_of(node: Node) -> int:
    """Return the number of dimensions of the node's tensor."""
    return len(shape_of(node))
