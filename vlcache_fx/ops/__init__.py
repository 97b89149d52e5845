"""Operators that passes insert into graphs: ``torch.ops.vlcache.*``.

Each has a schema, a fake and a reference implementation. Importing this module defines them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.errors import StoreError
from vlcache_fx.ops.attend import attend, attend_reference, decompose_attend
from vlcache_fx.ops.attention import FastAttention, decompose_attention, row_mask
from vlcache_fx.ops.causal_conv1d import causal_conv1d, decompose_causal_conv1d
from vlcache_fx.ops.linear import decompose_linear
from vlcache_fx.ops.recurrence import recur
from vlcache_fx.ops.recurrence_reference import recur_reference

__all__ = [
    "FastAttention",
    "attend",
    "attend_reference",
    "attention",
    "bind_donors",
    "causal_conv1d",
    "decompose_attend",
    "decompose_attention",
    "decompose_causal_conv1d",
    "decompose_linear",
    "lookup",
    "recur",
    "recur_reference",
    "row_mask",
    "scatter_rows",
    "scatter_rows_reference",
    "splice_rows",
    "splice_rows_reference",
    "take_rows",
    "take_rows_reference",
]

_donors: ContextVar[Mapping[str, Tensor] | None] = ContextVar("vlcache_donors", default=None)


@contextmanager
def bind_donors(donors: Mapping[Any, Tensor]) -> Iterator[None]:
    """Provide donor tables (slot, or its name -> table) to ``lookup`` nodes that run within the body."""
    token = _donors.set({str(slot): table for slot, table in donors.items()})
    try:
        yield
    finally:
        _donors.reset(token)


@torch.library.custom_op("vlcache::lookup", mutates_args=())
def lookup(like: Tensor, slot: str, dim: int) -> Tensor:  # noqa: ARG001 (the schema)
    """Return the donor table of ``slot``: rows of all hit spans along ``dim``, else the shape of ``like``.

    Lowerings replace this node by an input. When executed, it returns a copy of the table from
    ``bind_donors``.

    Raises:
        StoreError: no table is bound for ``slot``.
    """
    donors = _donors.get()
    if donors is None or slot not in donors:
        raise StoreError(f"no donor table is bound for slot {slot!r}; bound: {sorted(donors or ())}")
    return donors[slot].clone()


@lookup.register_fake
def _(like: Tensor, slot: str, dim: int) -> Tensor:  # noqa: ARG001 (the schema)
    sizes: list[int | torch.SymInt] = list(like.shape)
    sizes[dim] = torch.library.get_ctx().new_dynamic_size()
    return like.new_empty(sizes)


def take_rows_reference(x: Tensor, index: Tensor, dim: int, batch_dim: int) -> Tensor:
    """Gather rows per sample: ``out[.., b, .., i, ..] = x[.., b, .., index[b, i], ..]``.

    Args:
        x: [.., batch or 1, .., tokens, ..].
        index: int64 [batch, rows].
        dim: token dimension.
        batch_dim: batch dimension.

    Returns:
        [.., batch, .., rows, ..].
    """
    sizes = list(x.shape)
    sizes[batch_dim] = index.shape[0]
    x = x.expand(sizes)
    shape = [1] * x.dim()
    shape[batch_dim], shape[dim] = index.shape
    sizes[dim] = index.shape[1]
    order = index if batch_dim < dim else index.t()
    return x.gather(dim, order.reshape(shape).expand(sizes))


@torch.library.custom_op("vlcache::take_rows", mutates_args=())
def take_rows(x: Tensor, index: Tensor, dim: int, batch_dim: int) -> Tensor:
    """See ``take_rows_reference``."""
    return take_rows_reference(x, index, dim, batch_dim)


@take_rows.register_fake
def _(x: Tensor, index: Tensor, dim: int, batch_dim: int) -> Tensor:
    sizes = list(x.shape)
    sizes[batch_dim], sizes[dim] = index.shape
    return x.new_empty(sizes)


def splice_rows_reference(
    donor: Tensor, fresh: Tensor, source: Tensor, dim: int, batch_dim: int | None = None
) -> Tensor:
    """Merge rows: ``out[i] = donor[source[i]] if source[i] >= 0 else fresh[-source[i] - 1]`` along ``dim``.

    Args:
        donor: donor table, [..., donor rows, ...]; size 1 in ``batch_dim``, because all samples share it.
        fresh: recomputed rows, [..., rows, ...]; other sizes as in ``donor``.
        source: int64 [tokens], or [batch, tokens] with a ``batch_dim``.
        dim: row dimension.
        batch_dim: batch dimension, if each sample has its own source.

    Returns:
        [..., tokens, ...] of the dtype of ``fresh``.
    """
    if batch_dim is not None:
        stored = take_rows_reference(donor, source.clamp(min=0), dim, batch_dim)
        computed = take_rows_reference(fresh, (-1 - source).clamp(min=0), dim, batch_dim)
        shape = [1] * fresh.dim()
        shape[batch_dim], shape[dim] = source.shape
        order = source if batch_dim < dim else source.t().contiguous()  # the result inherits its strides
        return torch.where((order >= 0).reshape(shape), stored, computed)
    shape = [1] * fresh.dim()
    shape[dim] = -1
    stored = donor.index_select(dim, source.clamp(min=0))
    computed = fresh.index_select(dim, (-1 - source).clamp(min=0))
    return torch.where((source >= 0).view(shape), stored, computed)


@torch.library.custom_op("vlcache::splice_rows", mutates_args=())
def splice_rows(
    donor: Tensor, fresh: Tensor, source: Tensor, dim: int, batch_dim: int | None = None
) -> Tensor:
    """See ``splice_rows_reference``."""
    return splice_rows_reference(donor, fresh, source, dim, batch_dim)


@splice_rows.register_fake
def _(
    donor: Tensor,  # noqa: ARG001 (the schema)
    fresh: Tensor,
    source: Tensor,
    dim: int,
    batch_dim: int | None = None,  # noqa: ARG001
) -> Tensor:
    sizes = list(fresh.shape)
    sizes[dim] = source.shape[-1]
    return fresh.new_empty(sizes)


def scatter_rows_reference(features: Tensor, mask: Tensor) -> Tensor:
    """Put row k of ``features`` at the k-th True of ``mask``, zeros elsewhere.

    Args:
        features: [.., rows, hidden]; as many rows as ``mask`` has True elements.
        mask: bool [batch, tokens].

    Returns:
        [batch, tokens, hidden].
    """
    rows = features.reshape(-1, features.shape[-1])
    index = (mask.flatten().cumsum(0) - 1).clamp(min=0).view(mask.shape)
    return torch.where(mask.contiguous().unsqueeze(-1), rows[index], 0)


@torch.library.custom_op("vlcache::scatter_rows", mutates_args=())
def scatter_rows(features: Tensor, mask: Tensor) -> Tensor:
    """See ``scatter_rows_reference``."""
    return scatter_rows_reference(features, mask)


@scatter_rows.register_fake
def _(features: Tensor, mask: Tensor) -> Tensor:
    return features.new_empty((*mask.shape, features.shape[-1]))
