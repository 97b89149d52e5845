"""Complete keys: a digest that two different lists of parts never share.

Every part is written as a type tag, its length and its bytes, so the stream can be read back unambiguously:
an image of 30x150 and one of 150x30 with the same bytes differ, and so do ("ab", "c") and ("a", "bc"). The
hash is BLAKE3.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
from blake3 import blake3
from torch import Tensor

from vlcache_fx.errors import StoreError
from vlcache_fx.keys.device_digest import device_hashes
from vlcache_fx.keys.tensor_bytes import flat, plain, reading_bytes

Part: TypeAlias = bool | int | float | str | bytes | Tensor | tuple["Part", ...] | list["Part"] | None

# From here on, a tensor on a device is hashed there: below, launching takes longer than copying.
_DEVICE_BYTES = 1 << 18

# Below this, waking other threads takes longer than hashing.
_THREADED_BYTES = 1 << 20


class _Hasher(Protocol):
    def update(self, data: bytes | memoryview, /) -> object: ...


def content_digest(parts: Sequence[Part], *, threaded: bool = False) -> str:
    """BLAKE3 of typed, length-prefixed parts, as 64 hexadecimal digits.

    Args:
        parts: strings, bytes, numbers, booleans, None, tensors, and tuples or lists of them. A tensor counts
            with its dtype, shape and values, not with its strides. A tuple and a list are different; so are
            1, 1.0 and True, and 0.0 and -0.0. Large tensors on a device count by hashes made there
            (``device_digest``): such a digest is good in this process alone.
        threaded: read large tensors, outside of tuples and lists, with a thread per core. Slower where
            OpenMP's threads have just worked, as within a request: they spin for a while.

    Raises:
        StoreError: for a part of another type, or a tensor without plain bytes.
    """
    is_large = any(
        isinstance(part, Tensor)
        and part.device.type == "cpu"
        and part.numel() * part.element_size() >= _THREADED_BYTES
        for part in parts
    )
    hasher = blake3(max_threads=blake3.AUTO if threaded and is_large else 1)
    _write_parts(hasher, b"l", parts)
    return hasher.hexdigest()


def _write(hasher: _Hasher, tag: bytes, data: bytes | memoryview) -> None:
    hasher.update(tag + struct.pack("<Q", len(data)))
    hasher.update(data)


def _write_parts(hasher: _Hasher, tag: bytes, parts: Sequence[Part]) -> None:
    hasher.update(tag + struct.pack("<Q", len(parts)))
    for part in parts:
        _write_part(hasher, part)


def _write_part(hasher: _Hasher, part: Part) -> None:
    match part:
        case None:
            _write(hasher, b"n", b"")
        case bool():  # before int: True is one
            _write(hasher, b"?", b"\x01" if part else b"\x00")
        case int():
            _write(hasher, b"i", part.to_bytes(part.bit_length() // 8 + 1, "little", signed=True))
        case float():
            _write(hasher, b"f", struct.pack("<d", part))
        case str():
            _write(hasher, b"s", part.encode("utf-8", "surrogatepass"))
        case bytes():
            _write(hasher, b"b", part)
        case Tensor():
            _write_tensor(hasher, part)
        case tuple():
            _write_parts(hasher, b"t", part)
        case list():
            _write_parts(hasher, b"l", part)
        case _:
            raise StoreError(f"cannot make a key of a {type(part).__name__}")


def _write_tensor(hasher: _Hasher, tensor: Tensor) -> None:
    hasher.update(b"T")
    _write(hasher, b"s", str(tensor.dtype).encode())
    _write_parts(hasher, b"t", tuple(int(size) for size in tensor.shape))
    hashes = _hashed_on_device(tensor)
    if hashes is not None:
        _write(hasher, b"d", tensor_bytes(hashes))
    else:
        _write(hasher, b"b", tensor_bytes(tensor))


def _hashed_on_device(tensor: Tensor) -> Tensor | None:
    if tensor.device.type != "cuda" or tensor.numel() * tensor.element_size() < _DEVICE_BYTES:
        return None
    with reading_bytes():
        return device_hashes(tensor)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values in row-major order, as bytes; no copy for a contiguous tensor on the CPU.

    Raises:
        StoreError: for a tensor that has no plain bytes (sparse, fake, meta).
    """
    with reading_bytes():
        return flat(plain(tensor).cpu()).view(torch.uint8).numpy().data
