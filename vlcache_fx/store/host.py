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

    def get(self, key: str) -> Entry | None:
        """See ``Store.get``."""
        entry = super().get(key)
        if isinstance(entry, _Copied):
            entry.arrived.synchronize()
        return entry

    def _is_ready(self, entry: Entry) -> bool:
        return super()._is_ready(entry) and not _on_device(entry)

    def _prepared(self, entry: Entry) -> Entry:
        entry = super()._prepared(entry)
        return _on_host(entry) if _on_device(entry) else entry


class _Copied(Entry):
    """An entry whose tensors are complete after the event ``arrived``."""

    arrived: torch.cuda.Event

    def wait(self) -> None:
        """See ``Entry.wait``."""
        self.arrived.synchronize()


def _on_device(entry: Entry) -> set[torch.device]:
    """Return the GPUs of an entry's tensors; none are read, since they may still arrive."""
    return {entry.peek(name).device for name in entry.tensors if entry.peek(name).is_cuda}


def _on_host(entry: Entry) -> Entry:
    (device,) = _on_device(entry)
    copied = _Copied(
        {name: _pinned(tensor) for name, tensor in entry.tensors.items()}, entry.info, copy=False
    )
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record(torch.cuda.current_stream(device))
    object.__setattr__(copied, "arrived", arrived)
    return copied


def _pinned(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)
