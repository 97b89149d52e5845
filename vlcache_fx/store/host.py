"""A store in host memory, for models that run on a device with less memory than their donors need."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vlcache_fx.store.entry import Entry
from vlcache_fx.store.memory import MemoryStore


class HostStore(MemoryStore):
    """Like ``MemoryStore``, but entries move to pinned host memory.

    Copies from a GPU run behind the work that is queued there; the first ``get`` of an entry waits until its
    copy is complete. Without CUDA, entries stay as they are.

    Args:
        capacity_bytes: bound on the bytes of tensor storage, positive.
    """

    tier: ClassVar[str] = "host"

    def put(self, key: str, entry: Entry) -> bool:
        """See ``Store.put``."""
        if entry.nbytes <= self._capacity:  # else it is refused, and copying it would be in vain
            entry = _on_host(entry)
        return super().put(key, entry)

    def get(self, key: str) -> Entry | None:
        """See ``Store.get``."""
        entry = super().get(key)
        if isinstance(entry, _Copied):
            entry.arrived.synchronize()
        return entry


class _Copied(Entry):
    """An entry whose tensors are being copied until ``arrived``."""

    arrived: torch.cuda.Event


def _on_host(entry: Entry) -> Entry:
    devices = {tensor.device for tensor in entry.tensors.values() if tensor.is_cuda}
    if not devices:
        return entry
    copied = _Copied(
        {name: _pinned(tensor) for name, tensor in entry.tensors.items()}, entry.info, copy=False
    )
    (device,) = devices
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(device))
    object.__setattr__(copied, "arrived", arrived)
    return copied


def _pinned(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)
