"""A fingerprint of a model's weights that follows changes, cheaply enough to be asked for in every request.

The full digest is computed once. After that, every call compares

- which tensors these are, where their memory is, and their version counters: this notices replaced tensors
  and all in-place operations that autograd knows of;
- 256 values per tensor (all of a small one), bit by bit: this notices writes through ``.data`` (which do not
  count a version) such as an optimiser step, a merged adapter or a scaled matrix.

A write through ``.data`` that changes only values outside the samples, such as one row of an embedding, stays
unseen: reading all weights in every request would cost more than reuse saves. Whoever does that calls
``invalidate``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from vlcache_fx.errors import StoreError
from vlcache_fx.store.keys import Part, content_digest, flat

# Sampled per tensor: runs spread over it. Runs, because the cost is in cache lines, not in values.
_RUNS = 16
_RUN_LENGTH = 16
# Tensors compared in one go. Fewer than 2**15 values, above which PyTorch starts its threads: on busy cores,
# waiting for them takes milliseconds.
_GROUP = 120

# Elements per step of a checksum on a device: bounds its scratch memory to a few hundred MiB.
_CHUNK = 1 << 23
_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightsFingerprint:
    """Fingerprint of an ordered list of tensors.

    Equal bytes, dtypes and shapes in the same order give the same fingerprint, in other tensors and other
    processes too. On a device other than the CPU, a checksum computed there stands for the bytes (copying all
    weights to the host would take seconds), so the same weights have one fingerprint on the CPU and another
    one on a GPU.

    The samples are views: they keep the memory of the tensors last seen alive until the next call.

    Args:
        tensors: parameters and buffers.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._refresh(tensors)

    def current(self, tensors: Sequence[Tensor]) -> str:
        """The fingerprint of ``tensors`` now: the saved one when nothing changed, else a new one.

        Returns:
            64 hexadecimal digits.
        """
        if _identity(tensors) != self._identity or not self._samples_unchanged():
            self._refresh(tensors)
        return self._digest

    def invalidate(self) -> None:
        """Makes the next ``current`` read all bytes again."""
        self._identity: tuple[object, ...] = ()

    def _refresh(self, tensors: Sequence[Tensor]) -> None:
        # Identity and samples first: a write that comes in between makes the next call look again.
        self._identity = _identity(tensors)
        self._views = _sample_views(tensors)
        self._samples = [torch.cat(views) for views in self._views]
        self._digest = content_digest([_part(tensor) for tensor in tensors])

    def _samples_unchanged(self) -> bool:
        return all(
            torch.equal(torch.cat(views), samples)
            for views, samples in zip(self._views, self._samples, strict=True)
        )


def _identity(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    # The length makes the empty list differ from the mark that invalidate sets.
    return (
        len(tensors),
        *[(id(t), t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors],
    )


def _sample_views(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Views of the tensors' samples, grouped by what ``cat`` takes together."""
    groups: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        flat = _integers(tensor)
        if flat is None or flat.numel() == 0:
            continue
        view = flat
        if flat.numel() > _RUNS * _RUN_LENGTH:
            step = (flat.numel() - _RUN_LENGTH) // (_RUNS - 1)
            step -= 1 - step % 2  # odd, so as not to hit the same columns of a power-of-two matrix each time
            view = flat.as_strided((_RUNS, _RUN_LENGTH), (max(step, _RUN_LENGTH), 1), flat.storage_offset())
        groups[(view.device, view.dtype, view.dim())].append(view)
    return [views[i : i + _GROUP] for views in groups.values() for i in range(0, len(views), _GROUP)]


def _integers(tensor: Tensor) -> Tensor | None:
    """A flat integer view on the tensor's own memory, None where it has none.

    Integers, because NaN would differ from itself.
    """
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_meta:
        return None
    if not tensor.is_contiguous():
        # The whole storage instead, in memory order: a superset of the tensor's values.
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return flat(tensor).view(_INT_OF_SIZE[tensor.element_size()])


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
    flat = _integers(tensor.contiguous())
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
