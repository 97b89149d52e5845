"""``torch.ops.vlcache.take_rows``, ``splice_rows`` and ``scatter_rows``: gather, merge and place rows."""

import torch
from torch import Tensor

__all__ = [
    "scatter_rows",
    "scatter_rows_reference",
    "splice_rows",
    "splice_rows_reference",
    "take_rows",
    "take_rows_reference",
]


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
