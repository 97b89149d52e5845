"""Tensors whose bytes need not be read again: digests of their rows travel with them.

Processed photos and encoders' outputs are given out again and again, and reading one takes milliseconds. What
is known of a tensor is forgotten when it is written to.
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
"""The first row along a tensor's first dimension, and one past the last."""

NO_DIGESTS: Mapping[RowRange, str] = MappingProxyType({})


@dataclass(frozen=True)
class _Known:
    watch: TensorWatch
    digests: dict[RowRange, str]

    def __reduce__(self) -> Any:
        # It is about one tensor of one process. Copies and saved tensors get this in its place, because
        # ``torch.load`` refuses tensors that bring other classes along.
        return set, ()


def track(tensor: Tensor, digests: Mapping[RowRange, str] = NO_DIGESTS) -> None:
    """From now on ``digest_rows`` of this very tensor reads rows once, as long as nobody writes to it.

    A write that no version counter shows and that leaves the 256 values that are compared as they were is not
    noticed (see ``TensorWatch``).
    """
    with contextlib.suppress(UnreadableWeightsError):  # then there are no bytes to know of either
        setattr(tensor, ATTRIBUTE, _Known(TensorWatch([tensor]), dict(digests)))


def cached_digests(tensor: Tensor) -> Mapping[RowRange, str]:
    """The digests that are known of rows of this very tensor; none where it was written to."""
    known = _known(tensor)
    return NO_DIGESTS if known is None else known.digests


def is_tracked(tensor: Tensor) -> bool:
    """Whether this very tensor is one to ``track``, and is what it was then."""
    return _known(tensor) is not None


def _known(tensor: Tensor) -> _Known | None:
    known = getattr(tensor, ATTRIBUTE, None)
    return known if isinstance(known, _Known) and known.watch.unchanged([tensor]) else None


def digest_rows(tensor: Tensor, bounds: Sequence[RowRange], *, threaded: bool = False) -> list[str]:
    """A digest of each of these ranges of rows: dtype, shape and values.

    Args:
        tensor: of one dimension or more.
        bounds: of the ranges.
        threaded: see ``content_digest``.

    Raises:
        StoreError: the tensor has no plain bytes.
    """
    known = _known(tensor)
    digests = {} if known is None else known.digests
    for rows in bounds:
        if rows not in digests:
            digests[rows] = content_digest([tensor[slice(*rows)]], threaded=threaded)
    return [digests[rows] for rows in bounds]


def row_ranges(lengths: Sequence[int]) -> list[RowRange]:
    """The ranges of rows that lie one behind the other."""
    return list(pairwise(accumulate(lengths, initial=0)))


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """The parts one behind the other, along the first dimension, and what is known of their rows."""
    joined = torch.cat(tuple(parts))
    digests = [
        {(first + start, first + end): digest for (start, end), digest in cached_digests(part).items()}
        for part, (first, _) in zip(parts, row_ranges([part.shape[0] for part in parts]), strict=True)
    ]
    if all(digests):
        track(joined, {rows: digest for found in digests for rows, digest in found.items()})
    return joined
