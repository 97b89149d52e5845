"""Encoder results as store entries, and back."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vlcache_fx.keys.digest_cache import cached_digests, digest_rows, track
from vlcache_fx.store.entry import Entry, Json
from vlcache_fx.store.eviction import with_cost


def pack(results: Sequence[Any], *, cost_ms: float | None = None) -> Entry:
    """Return an entry of tensors and JSON values; the entry's tensors carry their digests.

    ``cost_ms`` is what computing them again would take, None if not measured.

    Raises:
        StoreError: a value is neither a tensor nor JSON data.
    """
    tensors = {str(index): value for index, value in enumerate(results) if isinstance(value, Tensor)}
    info = [_metadata(value) if isinstance(value, Tensor) else value for value in results]
    devices: dict[str, Json] = {name: str(tensor.device) for name, tensor in tensors.items()}
    packed: dict[str, Json] = {"kind": "encoder", "results": info, "devices": devices}
    entry = Entry(tensors, with_cost(packed, cost_ms))
    for name, tensor in tensors.items():
        if tensor.dim() > 0:
            track(tensor)
            digest_rows(tensor, [(0, tensor.shape[0])])
            track(entry.tensors[name], cached_digests(tensor))
    return entry


def unpack(entry: Entry) -> list[Any] | None:
    """Return the packed results, tensors as copies on the device where they were packed.

    Callers may write to the copies; copying costs little next to encoding. Returns None for a damaged entry
    or one of another kind.
    """
    info, devices = entry.info.get("results"), entry.info.get("devices")
    if not isinstance(info, list) or not isinstance(devices, dict):
        return None
    results: list[Any] = []
    for index, value in enumerate(info):
        if not isinstance(value, dict):
            results.append(value)
            continue
        tensor, device = entry.tensors.get(str(index)), devices.get(str(index))
        if tensor is None or _metadata(tensor) != value or not isinstance(device, str):
            return None
        copied = tensor.to(device, copy=True)  # a host tier may have moved the tensor
        if copied.device == tensor.device and cached_digests(tensor):
            track(copied, cached_digests(tensor))
        results.append(copied)
    return results


def _metadata(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
