"""The value that a store keeps under one key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from vlcache_fx.errors import StoreError

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None


@dataclass(frozen=True, eq=False)
class Entry:
    """Named tensors and JSON data, both as read-only mappings.

    Each tensor is detached, contiguous and alone in its storage, so an entry occupies exactly ``nbytes`` and
    never keeps a larger activation alive. Tensors are copied, so later writes by the caller do not change the
    entry. With ``copy=False``, only views and inference tensors are copied; the caller must not write to the
    others. An entry's tensors are read-only.

    Raises:
        StoreError: a value is not a strided tensor, or ``info`` is not JSON data.
    """

    tensors: Mapping[str, Tensor]
    info: Mapping[str, Json]
    copy: InitVar[bool] = True

    def __post_init__(self, copy: bool) -> None:
        try:
            # The round trip checks for JSON data and shares nothing mutable with the caller.
            info = json.loads(json.dumps(dict(self.info), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise StoreError(f"an entry's info must be JSON data: {error}") from error
        tensors = {name: _own(name, tensor, copy) for name, tensor in self.tensors.items()}
        object.__setattr__(self, "tensors", MappingProxyType(tensors))
        object.__setattr__(self, "info", MappingProxyType(info))

    @property
    def nbytes(self) -> int:
        """Bytes of tensor storage."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


def _own(name: str, tensor: Tensor, copy: bool) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise StoreError(f"an entry's {name!r} must be a dense tensor, not {type(tensor).__name__}")
    exact = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    plain = not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference())
    if not copy and exact and plain and tensor.is_contiguous():
        return tensor.detach()
    # Outside inference mode, because later calls with autograd cannot use inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        owned = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return owned.copy_(tensor)
