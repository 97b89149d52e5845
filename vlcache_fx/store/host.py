"""A store in host memory, for donors that exceed the device's memory."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vlcache_fx.store.entry import Entry
from vlcache_fx.store.memory import MemoryStore


class HostStore(MemoryStore):
    """A ``MemoryStore`` that moves entries to pinned host memory.

    Copies are asynchronous, on the GPU's current stream; ``get`` waits until the entry's copy is complete.
    CPU entries are stored unchanged.

    Args:
        capacity_bytes: bound on the bytes of tensor storage, positive.
    """

    tier: ClassVar[str] = "host"

    def put(self, key: str, entry: Entry) -> bool:
        """See ``Store.put``."""
        if entry.nbytes <= self._capacity:  # larger entries are rejected below
            entry = _on_host(entry)
        return super().put(key, entry)

    def get(self, key: str) -> Entry | None:
        """See ``Store.get``."""
        entry = super().get(key)
        if isinstance(entry, _Copied):
            entry.arrived.synchronize()
        return entry


class _Copied(Entry):
    """An entry whose tensors are complete after the event ``arrived``."""

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
