"""Tensors as they are read for keys: plain values, in one row, and what it is called when they cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from vlcache_fx.errors import StoreError


def plain(tensor: Tensor) -> Tensor:
    """The tensor's values in row-major order, none of them lazy; the tensor's own memory where it is so."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def flat(tensor: Tensor) -> Tensor:
    """A contiguous tensor as one dimension of stride 1, sharing its memory."""
    # Not reshape(-1): a tensor of one value is contiguous whatever its stride, and would keep it.
    return tensor.as_strided((tensor.numel(),), (1,))


@contextmanager
def reading_bytes() -> Iterator[None]:
    """Within it, a tensor that has no plain bytes (sparse, fake, meta) is a ``StoreError``."""
    try:
        yield
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise StoreError(f"cannot read the bytes of a tensor: {error}") from error
