"""Fingerprint of a model's weights, cheap enough to be checked in every request.

The full digest is computed once, and again when a ``TensorWatch`` detects a change. A write through ``.data``
to values outside the samples, such as one row of an embedding, is missed: reading all weights in every
request would cost more than reuse saves. Call ``invalidate`` after such a write.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlcache_fx.errors import StoreError
from vlcache_fx.keys.digest import Part, content_digest
from vlcache_fx.keys.inner_tensors import leaves_of
from vlcache_fx.keys.watch import TensorWatch, integer_view

# Elements per step of a device checksum; bounds its scratch memory to a few hundred MiB.
_CHUNK = 1 << 23


class WeightsFingerprint:
    """Fingerprint of an ordered list of tensors.

    It depends on bytes, dtypes, shapes and order alone, so it is equal across processes. Tensors on a GPU
    contribute a checksum computed there, because copying all weights to the host would take seconds; the same
    weights therefore have different fingerprints on the CPU and on a GPU.

    Composite tensors (quantised, sharded, sparse) contribute their inner tensors and structure: equal
    integers with different scales are different weights.

    Args:
        tensors: parameters and buffers.

    Raises:
        UnreadableWeightsError: a tensor has no readable bytes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._watch: TensorWatch | None = None
        self._digest = ""
        self._read(tensors)

    def current(self, tensors: Sequence[Tensor]) -> str:
        """Return the fingerprint of ``tensors``, recomputed if a change was detected.

        Returns:
            64 hexadecimal digits.

        Raises:
            UnreadableWeightsError: a tensor has no readable bytes.
        """
        if self._watch is None or not self._watch.unchanged(tensors):
            self._read(tensors)
        return self._digest

    def invalidate(self) -> None:
        """Make the next ``current`` read all bytes again."""
        self._watch = None

    def _read(self, tensors: Sequence[Tensor]) -> None:
        # The watch first, so that the next call detects a write during the digest.
        self._watch = None
        watch, leaves = TensorWatch(tensors), leaves_of(tensors)
        parts = [_part(tensor) for tensor in leaves.tensors]
        # Plain tensors contribute no structure: profiles and manifests contain the digest of their bytes.
        self._digest = content_digest(
            [*parts, leaves.structure] if leaves.structure else parts, threaded=True
        )
        self._watch = watch


def _part(tensor: Tensor) -> Part:
    if tensor.device.type == "cpu":
        return tensor
    return (str(tensor.dtype), tuple(tensor.shape), device_checksum(tensor))


def device_checksum(tensor: Tensor) -> int:
    """Return a 64-bit checksum of a tensor's values in order, computed on its device in linear time.

    The sum of all elements, each mixed with its index to 64 bits (the finaliser of SplitMix64). It detects
    accidental changes with overwhelming probability, but not weights crafted to collide.

    Raises:
        StoreError: the tensor has no memory of its own.
    """
    flat = integer_view(tensor.contiguous())
    if flat is None:
        raise StoreError("cannot compute a checksum of a tensor without memory of its own")
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        values = flat[start : start + _CHUNK].to(torch.int64)
        index = torch.arange(start + 1, start + 1 + values.numel(), device=flat.device)
        total += _mix(values + _mix(index)).sum()
    return int(total)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47  # 0xbf58476d1ce4e5b9 as a signed integer
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94d049bb133111eb
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical shift, which signed integers lack
