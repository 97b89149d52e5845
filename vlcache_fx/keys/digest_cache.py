"""Digests cached on tensors, per range of rows.

Image processors and the encoder cache return the same pixels and features in many requests; hashing them
takes milliseconds. A tensor's cached digests are dropped when the tensor is written to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vlcache_fx.errors import UnreadableWeightsError
from vlcache_fx.keys.digest import content_digest
from vlcache_fx.keys.watch import TensorWatch

__all__ = ["RowRange", "cached_digests", "digest_rows", "is_tracked", "join_rows", "row_ranges", "track"]

ATTRIBUTE = "_vlcache_digests"

RowRange: TypeAlias = tuple[int, int]
"""``(start, end)`` along a tensor's first dimension; ``end`` is exclusive."""

NO_DIGESTS: Mapping[RowRange, str] = MappingProxyType({})


@dataclass(frozen=True)
class _Cache:
    watch: TensorWatch
    digests: dict[RowRange, str]

    def __reduce__(self) -> Any:
        # Digests belong to one tensor of one process. Copied and saved tensors carry an empty set instead,
        # because ``torch.load`` refuses tensors with attributes of other classes.
        return set, ()


def track(tensor: Tensor, digests: Mapping[RowRange, str] = NO_DIGESTS) -> None:
    """Cache digests on this tensor object until it is written to.

    A write that changes neither the version counter nor the 256 sampled values is missed (see
    ``TensorWatch``).

    Args:
        tensor: of one dimension or more. Ignored if its bytes cannot be read.
        digests: digests of its rows that are known already.
    """
    with contextlib.suppress(UnreadableWeightsError):
        setattr(tensor, ATTRIBUTE, _Cache(TensorWatch([tensor]), dict(digests)))


def cached_digests(tensor: Tensor) -> Mapping[RowRange, str]:
    """Return the digests cached on this tensor object; empty after a write."""
    cache = _cache(tensor)
    return NO_DIGESTS if cache is None else cache.digests


def is_tracked(tensor: Tensor) -> bool:
    """Return whether this tensor object was passed to ``track`` and has not been written to since."""
    return _cache(tensor) is not None


def _cache(tensor: Tensor) -> _Cache | None:
    cache = getattr(tensor, ATTRIBUTE, None)
    return cache if isinstance(cache, _Cache) and cache.watch.unchanged([tensor]) else None


def digest_rows(tensor: Tensor, ranges: Sequence[RowRange], *, threaded: bool = False) -> list[str]:
    """Return the ``content_digest`` of each range of rows: dtype, shape and values.

    Args:
        tensor: of one dimension or more.
        ranges: ranges of rows; may overlap.
        threaded: see ``content_digest``.

    Raises:
        StoreError: the tensor has no plain bytes.
    """
    cache = _cache(tensor)
    digests = {} if cache is None else cache.digests
    for rows in ranges:
        if rows not in digests:
            digests[rows] = content_digest([tensor[slice(*rows)]], threaded=threaded)
    return [digests[rows] for rows in ranges]


def row_ranges(lengths: Sequence[int]) -> list[RowRange]:
    """Return consecutive ranges of these lengths: [2, 3] gives [(0, 2), (2, 5)]."""
    return list(pairwise(accumulate(lengths, initial=0)))


def join_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first dimension and keep the cached digests, if every tensor has some."""
    joined = torch.cat(tuple(tensors))
    digests = [
        {(first + start, first + end): digest for (start, end), digest in cached_digests(tensor).items()}
        for tensor, (first, _) in zip(
            tensors, row_ranges([tensor.shape[0] for tensor in tensors]), strict=True
        )
    ]
    if all(digests):
        track(joined, {rows: digest for shifted in digests for rows, digest in shifted.items()})
    return joined
