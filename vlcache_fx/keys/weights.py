"""A fingerprint of a model's weights that follows changes, cheaply enough to be asked for in every request.

The full digest is computed once, and again when a ``TensorWatch`` sees a change. A write through ``.data``
that changes only values outside its samples, such as one row of an embedding, stays unseen: reading all
weights in every request would cost more than reuse saves. Whoever does that calls ``invalidate``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlcache_fx.errors import StoreError
from vlcache_fx.keys.digest import Part, content_digest
from vlcache_fx.keys.inner_tensors import leaves_of
from vlcache_fx.keys.watch import TensorWatch, integer_view

# Elements per step of a checksum on a device: bounds its scratch memory to a few hundred MiB.
_CHUNK = 1 << 23


class WeightsFingerprint:
    """Fingerprint of an ordered list of tensors.

    Equal bytes, dtypes and shapes in the same order give the same fingerprint, in other tensors and other
    processes too. On a device other than the CPU, a checksum computed there stands for the bytes (copying all
    weights to the host would take seconds), so the same weights have one fingerprint on the CPU and another
    one on a GPU.

    Of a tensor that is made of others (quantised, sharded, sparse), these count, and how they make up the
    whole: equal integers with other scales are other weights.

    Args:
        tensors: parameters and buffers.

    Raises:
        UnreadableWeightsError: one of the tensors has no bytes that could be read.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._watch: TensorWatch | None = None
        self._digest = ""
        self._read(tensors)

    def current(self, tensors: Sequence[Tensor]) -> str:
        """The fingerprint of ``tensors`` now: the saved one when nothing changed, else a new one.

        Returns:
            64 hexadecimal digits.

        Raises:
            UnreadableWeightsError: one of the tensors has no bytes that could be read.
        """
        if self._watch is None or not self._watch.unchanged(tensors):
            self._read(tensors)
        return self._digest

    def invalidate(self) -> None:
        """Makes the next ``current`` read all bytes again."""
        self._watch = None

    def _read(self, tensors: Sequence[Tensor]) -> None:
        # The watch first: a write that comes in between makes the next call look again.
        self._watch = None
        watch, leaves = TensorWatch(tensors), leaves_of(tensors)
        parts = [_part(tensor) for tensor in leaves.tensors]
        # Of plain tensors, the digest is that of their bytes alone: it is written in profiles and manifests.
        self._digest = content_digest([*parts, leaves.form] if leaves.form else parts, threaded=True)
        self._watch = watch


def _part(tensor: Tensor) -> Part:
    if tensor.device.type == "cpu":
        return tensor
    return (str(tensor.dtype), tuple(tensor.shape), device_checksum(tensor))


def device_checksum(tensor: Tensor) -> int:
    """A 64-bit checksum of a tensor's values in order, computed where the tensor is, in linear time.

    Every element is mixed with its index to 64 bits (the finaliser of SplitMix64), and all are added up. It
    notices any accidental change with overwhelming odds; it does not withstand someone who crafts weights to
    collide.
    """
    flat = integer_view(tensor.contiguous())
    if flat is None:
        raise StoreError("cannot make a checksum of a tensor that has no memory of its own")
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
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # the logical shift that signed integers lack
