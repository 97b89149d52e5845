"""Notices changes of tensors without reading them whole."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from vlcache_fx.keys.inner_tensors import leaves_of
from vlcache_fx.keys.tensor_bytes import flat

# Sampled per tensor: runs spread over it. Runs, because the cost is in cache lines, not in values.
_RUNS = 16
_RUN_LENGTH = 16
# Tensors compared in one go. Fewer than 2**15 values, above which PyTorch starts its threads: on busy cores,
# waiting for them takes milliseconds.
_GROUP = 120
_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TensorWatch:
    """Remembers a list of tensors and tells whether they are the same, unchanged.

    It compares

    - which tensors these are, where their memory is, and their version counters: this notices replaced
      tensors and all in-place operations that autograd knows of;
    - 256 values per tensor (all of a small one), bit by bit: this notices most writes that count no version,
      through ``.data`` or NumPy, such as an optimiser step, a merged adapter or a scaled matrix.

    Of a tensor that is made of others (quantised, sharded, sparse), it is these, and how they make up the
    whole, that count.

    The samples are views, dropped when one of the tensors dies: a watch keeps no memory of models that are
    gone.

    Raises:
        UnreadableWeightsError: one of the tensors has no bytes that could be read.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        leaves = leaves_of(tensors)
        self._ids, self._form, self._identity = _ids(tensors), leaves.form, _identity(leaves.tensors)
        self._views = _sample_views(leaves.tensors)
        self._samples = [torch.cat(views) for views in self._views]
        self._is_over = False
        own = weakref.ref(self)

        def drop(_: object) -> None:
            watch = own()
            if watch is not None:
                watch._is_over, watch._views, watch._samples = True, [], []

        self._alive = [weakref.ref(tensor, drop) for tensor in tensors]

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """True where ``tensors`` are those that were given, and hold what they held as far as can be seen.

        Raises:
            UnreadableWeightsError: one of the tensors has no bytes that could be read any more.
        """
        if self._is_over or _ids(tensors) != self._ids:
            return False
        leaves = leaves_of(tensors)
        if leaves.form != self._form or _identity(leaves.tensors) != self._identity:
            return False
        differences: dict[torch.device, list[Tensor]] = defaultdict(list)
        for views, samples in zip(self._views, self._samples, strict=True):
            if samples.device.type != "cpu":  # a GPU is waited for once, not once per group
                differences[samples.device].append((torch.cat(views) != samples).any())
            elif not torch.equal(torch.cat(views), samples):
                return False
        return not any(bool(torch.stack(found).any()) for found in differences.values())


def _ids(tensors: Sequence[Tensor]) -> list[int]:
    return [id(tensor) for tensor in tensors]


def _identity(leaves: Sequence[Tensor]) -> list[object]:
    return [(t.data_ptr(), -1 if t.is_inference() else t._version, t.dtype, t.shape) for t in leaves]


def _sample_views(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Views of the tensors' samples, grouped by what ``cat`` takes together."""
    groups: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        flat = integer_view(tensor)
        if flat is None or flat.numel() == 0:
            continue
        view = flat
        if flat.numel() > _RUNS * _RUN_LENGTH:
            step = (flat.numel() - _RUN_LENGTH) // (_RUNS - 1)
            step -= 1 - step % 2  # odd, so as not to hit the same columns of a power-of-two matrix each time
            view = flat.as_strided((_RUNS, _RUN_LENGTH), (max(step, _RUN_LENGTH), 1), flat.storage_offset())
        groups[(view.device, view.dtype, view.dim())].append(view)
    return [views[i : i + _GROUP] for views in groups.values() for i in range(0, len(views), _GROUP)]


def integer_view(tensor: Tensor) -> Tensor | None:
    """A flat integer view on the tensor's own memory, None where it has none.

    Integers, because NaN would differ from itself.
    """
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_conj() or tensor.is_neg():
        return None
    if not tensor.is_contiguous():
        # The whole storage instead, in memory order: a superset of the tensor's values.
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return flat(tensor).view(_INT_OF_SIZE[tensor.element_size()])
