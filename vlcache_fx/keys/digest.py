"""Complete keys: different lists of parts never share a digest.

Each part contributes a type tag, its length and its bytes, so the hashed stream is unambiguous: a 30x150 and
a 150x30 image with the same bytes differ, and so do ("ab", "c") and ("a", "bc"). The hash is BLAKE3. Digests
are the same in every process and on every device.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
from blake3 import blake3
from torch import Tensor

from vlcache_fx.errors import StoreError
from vlcache_fx.keys.device_digest import device_digest
from vlcache_fx.keys.tensor_bytes import flat, plain, reading_bytes

Part: TypeAlias = bool | int | float | str | bytes | Tensor | tuple["Part", ...] | list["Part"] | None

LARGE_BYTES = 1 << 18
"""Tensors of this size or more contribute the BLAKE3 digest of their bytes, others the bytes.

A device can compute the former. Smaller tensors are copied to the host: launching kernels takes longer.
"""

# Smaller tensors are hashed by one thread: waking others takes longer than hashing.
_THREADED_BYTES = 1 << 20


class _Hasher(Protocol):
    def update(self, data: bytes | memoryview, /) -> object: ...


def content_digest(parts: Sequence[Part], *, threaded: bool = False) -> str:
    """Return the BLAKE3 hash of typed, length-prefixed parts, as 64 hexadecimal digits.

    Args:
        parts: strings, bytes, numbers, booleans, None, tensors, and tuples or lists of them. Tensors
            contribute dtype, shape and values, not strides. A tuple differs from a list, 1 from 1.0 and True,
            0.0 from -0.0. Large tensors on a GPU are hashed there (``device_digest``).
        threaded: hash large CPU tensors with a thread per core. Slower right after OpenMP work, as within a
            request, because OpenMP's threads keep spinning for a while.

    Raises:
        StoreError: a part has another type, or is a tensor without plain bytes.
    """
    hasher = blake3()
    _write_parts(hasher, b"l", parts, threaded)
    return hasher.hexdigest()


def _write(hasher: _Hasher, tag: bytes, data: bytes | memoryview) -> None:
    hasher.update(tag + struct.pack("<Q", len(data)))
    hasher.update(data)


def _write_parts(hasher: _Hasher, tag: bytes, parts: Sequence[Part], threaded: bool) -> None:
    hasher.update(tag + struct.pack("<Q", len(parts)))
    for part in parts:
        _write_part(hasher, part, threaded)


def _write_part(hasher: _Hasher, part: Part, threaded: bool) -> None:
    match part:
        case None:
            _write(hasher, b"n", b"")
        case bool():  # before int: True is an int
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
            _write_tensor(hasher, part, threaded)
        case tuple():
            _write_parts(hasher, b"t", part, threaded)
        case list():
            _write_parts(hasher, b"l", part, threaded)
        case _:
            raise StoreError(f"a {type(part).__name__} cannot be part of a key")


def _write_tensor(hasher: _Hasher, tensor: Tensor, threaded: bool) -> None:
    hasher.update(b"T")
    _write(hasher, b"s", str(tensor.dtype).encode())
    _write_parts(hasher, b"t", tuple(int(size) for size in tensor.shape), threaded=False)
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes < LARGE_BYTES:
        _write(hasher, b"b", tensor_bytes(tensor))
        return
    digest = device_digest(tensor)
    if digest is None:
        threads = blake3.AUTO if threaded and nbytes >= _THREADED_BYTES else 1
        digest = blake3(tensor_bytes(tensor), max_threads=threads).digest()
    _write(hasher, b"d", digest)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the tensor's values in row-major order as bytes; no copy for a contiguous CPU tensor.

    Raises:
        StoreError: the tensor has no plain bytes (sparse, fake, meta).
    """
    with reading_bytes():
        return flat(plain(tensor).cpu()).view(torch.uint8).numpy().data
