"""Raw bytes of a tensor, for hashing. Raises ``StoreError`` for tensors without plain storage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from vlcache_fx.errors import StoreError


def plain(tensor: Tensor) -> Tensor:
    """Return the values in row-major order, with conjugation and negation resolved; copies only if needed."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def flat(tensor: Tensor) -> Tensor:
    """Return a one-dimensional view of stride 1 of a contiguous tensor."""
    # Not reshape(-1): a tensor of one value is contiguous with any stride, and would keep it.
    return tensor.as_strided((tensor.numel(),), (1,))


@contextmanager
def reading_bytes() -> Iterator[None]:
    """Raise ``StoreError`` where the body reads a tensor without plain bytes (sparse, fake, meta)."""
    try:
        yield
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise StoreError(f"cannot read the bytes of a tensor: {error}") from error
