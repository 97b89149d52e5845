"""BLAKE3 of a tensor on a GPU, computed there: the digest that the host computes from the same bytes.

Copying a photo's features to the host and hashing them there takes longer than a warm prefill. Kernels hash
them on the device; only the digest is copied. So keys are the same on every device, in every process and on
every machine. They need no secret: nobody can find other bytes with the same digest of a cryptographic hash,
whether or not they know how it is computed. The secret of a store authenticates what is read back from it, it
does not make keys.
"""

from __future__ import annotations

import functools
import logging

import torch
from blake3 import blake3
from torch import Tensor

from vlcache_fx.keys.tensor_bytes import flat, plain, reading_bytes
from vlcache_fx.keys.tree_hash import CHUNK_BYTES, Steps, tree_digest

_log = logging.getLogger("vlcache_fx")

CHECKED_BYTES = (1, 3 * CHUNK_BYTES, 4 * CHUNK_BYTES + 65)
"""Lengths that are compared with the host before the first use of a device."""


class DeviceHasher:
    """BLAKE3 on one device. The first failure or difference is logged; from then on the host hashes.

    Args:
        steps: computes the steps of the tree; None if the device cannot.
        device: the device.
    """

    def __init__(self, steps: Steps | None, device: torch.device) -> None:
        self._steps, self._device = steps, device
        self._was_checked = False

    def digest(self, data: Tensor) -> bytes | None:
        """Return the digest of bytes on this device, see ``tree_digest``; None where the host has to hash."""
        if self._steps is None:
            return None
        try:
            if not self._was_checked:
                self._check(self._steps)
                self._was_checked = True
            return _bytes_of(tree_digest(data, self._steps))
        except Exception as error:  # noqa: BLE001 - compilers and drivers raise anything
            self._steps = None
            text = str(error).partition("\n")[0]
            _log.warning("vlcache: cannot hash on %s, the host hashes instead: %s", self._device, text)
            return None

    def _check(self, steps: Steps) -> None:
        for nbytes in CHECKED_BYTES:
            data = torch.arange(nbytes).remainder(251).to(torch.uint8)
            found = _bytes_of(tree_digest(data.to(self._device), steps))
            if found != blake3(data.numpy().data).digest():
                raise ValueError(f"the digest of {nbytes} bytes is wrong")


@functools.cache
def hasher_of(device: torch.device) -> DeviceHasher:
    """Return the hasher of a device: kernels for CUDA, none for others."""
    if device.type != "cuda":
        return DeviceHasher(None, device)
    try:
        from vlcache_fx.keys.triton_blake3 import TritonSteps

        return DeviceHasher(TritonSteps(), device)
    except Exception as error:  # noqa: BLE001 - see above
        _log.warning("vlcache: cannot hash on %s, the host hashes instead: %s", device, error)
        return DeviceHasher(None, device)


def device_digest(tensor: Tensor) -> bytes | None:
    """Return the BLAKE3 digest of a tensor's values in row-major order, computed on its device.

    Args:
        tensor: of at least one byte.

    Returns:
        32 bytes; None where the host has to hash.

    Raises:
        StoreError: the tensor has no plain bytes (fake, meta).
    """
    if tensor.device.type != "cuda":
        return None
    with torch.inference_mode(False), torch.no_grad():
        with reading_bytes():
            data = byte_view(tensor)
        with torch.cuda.device(tensor.device):
            return hasher_of(tensor.device).digest(data)


def byte_view(tensor: Tensor) -> Tensor:
    """Return the values in row-major order as uint8 [bytes]; a copy where kernels cannot read the memory."""
    data = flat(plain(tensor)).view(torch.uint8)
    return data if data.data_ptr() % 4 == 0 and data.storage_offset() % 4 == 0 else data.clone()


def _bytes_of(words: Tensor) -> bytes:
    return words.cpu().numpy().astype("<i4").tobytes()
