"""Change detection for tensors by sampling, without reading them completely."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from vlcache_fx.keys.inner_tensors import leaves_of
from vlcache_fx.keys.tensor_bytes import flat

# Samples per tensor: consecutive values in chunks spread over it, because the cost is per cache line.
_CHUNKS = 16
_CHUNK_LENGTH = 16
# Tensors per comparison. Together fewer than 2**15 values, above which PyTorch uses several threads: on busy
# cores, waiting for them takes milliseconds.
_GROUP = 120
_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TensorWatch:
    """Detects whether a list of tensors has changed since the watch was created.

    It compares

    - object identity, address and version counter of every tensor: detects replaced tensors and in-place
      operations that autograd records;
    - 256 values per tensor (all values of smaller tensors), bit by bit: detects most writes through ``.data``
      or NumPy, such as an optimiser step, a merged adapter or a scaled matrix.

    Composite tensors (quantised, sharded, sparse) are compared by their inner tensors and structure.

    The samples are views and are dropped when one of the tensors dies, so a watch keeps no model alive.

    Raises:
        UnreadableWeightsError: a tensor has no readable bytes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        leaves = leaves_of(tensors)
        self._ids, self._structure, self._identity = (
            _ids(tensors),
            leaves.structure,
            _identity(leaves.tensors),
        )
        self._views = _sample_views(leaves.tensors)
        self._samples = [torch.cat(views) for views in self._views]
        self._is_dead = False
        self_ref = weakref.ref(self)

        def drop(_: object) -> None:
            watch = self_ref()
            if watch is not None:
                watch._is_dead, watch._views, watch._samples = True, [], []

        self._alive = [weakref.ref(tensor, drop) for tensor in tensors]

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether ``tensors`` are the same objects and no change was detected.

        Raises:
            UnreadableWeightsError: a tensor has no readable bytes any more.
        """
        if self._is_dead or _ids(tensors) != self._ids:
            return False
        leaves = leaves_of(tensors)
        if leaves.structure != self._structure or _identity(leaves.tensors) != self._identity:
            return False
        differences: dict[torch.device, list[Tensor]] = defaultdict(list)
        for views, samples in zip(self._views, self._samples, strict=True):
            if samples.device.type != "cpu":  # one synchronisation per device, not per group
                differences[samples.device].append((torch.cat(views) != samples).any())
            elif not torch.equal(torch.cat(views), samples):
                return False
        return not any(bool(torch.stack(flags).any()) for flags in differences.values())


def _ids(tensors: Sequence[Tensor]) -> list[int]:
    return [id(tensor) for tensor in tensors]


def _identity(leaves: Sequence[Tensor]) -> list[object]:
    return [(t.data_ptr(), -1 if t.is_inference() else t._version, t.dtype, t.shape) for t in leaves]


def _sample_views(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return views of the tensors' samples, grouped so that ``torch.cat`` accepts each group."""
    groups: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        flat = integer_view(tensor)
        if flat is None or flat.numel() == 0:
            continue
        view = flat
        if flat.numel() > _CHUNKS * _CHUNK_LENGTH:
            step = (flat.numel() - _CHUNK_LENGTH) // (_CHUNKS - 1)
            step -= 1 - step % 2  # odd: a power-of-two matrix is sampled in different columns
            view = flat.as_strided(
                (_CHUNKS, _CHUNK_LENGTH), (max(step, _CHUNK_LENGTH), 1), flat.storage_offset()
            )
        groups[(view.device, view.dtype, view.dim())].append(view)
    return [views[i : i + _GROUP] for views in groups.values() for i in range(0, len(views), _GROUP)]


def integer_view(tensor: Tensor) -> Tensor | None:
    """Return a one-dimensional integer view of the tensor's memory, or None for tensors without memory.

    Integers, because NaN differs from itself.
    """
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_conj() or tensor.is_neg():
        return None
    if not tensor.is_contiguous():
        # The complete storage in memory order: a superset of the tensor's values.
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return flat(tensor).view(_INT_OF_SIZE[tensor.element_size()])
