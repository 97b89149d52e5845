"""Digest of device tensors without copying their bytes to the host: a keyed hash of blocks, at memory speed.

Copying a photo's features to the host and hashing them there takes longer than a warm prefill. A random
linear map hashes each block on the device, with a secret key per process (multilinear hashing; Lemire and
Kaser, arXiv 1202.4961). Only the hashes, 1/500 of the bytes, are copied to the host. Over the choice of the
key, two different blocks share their hashes with probability at most 2**-128. Every process has its own key,
so these digests are valid within one process.
"""

from __future__ import annotations

import functools
import secrets

import torch
from torch import Tensor

from vlcache_fx.keys.tensor_bytes import flat, plain

BLOCK_WORDS = 4096
"""32-bit words of a block."""

KEYS = 4
"""64-bit hashes per block."""

CHUNK_BLOCKS = 2048
"""Blocks per step; bounds the scratch memory to about 150 MB."""


def block_hashes(words: Tensor, keys: Tensor) -> Tensor:
    """Hash every block of ``words``.

    Args:
        words: int32 [words], contiguous. The last block is padded with zeros, so callers must compare
            lengths separately.
        keys: int64 [KEYS, BLOCK_WORDS], random, on the same device.

    Returns:
        int64 [blocks, KEYS]: sums of the products of words and keys, modulo 2**64.
    """
    blocks, rest = divmod(words.numel(), BLOCK_WORDS)
    whole = words[: blocks * BLOCK_WORDS].view(blocks, BLOCK_WORDS)
    chunks = list(torch.split(whole, CHUNK_BLOCKS)) if blocks else []
    hashes = [_hash(chunk, keys) for chunk in chunks]
    if rest or not blocks:
        hashes.append(_hash(words[blocks * BLOCK_WORDS :].view(1, rest), keys[:, :rest]))
    return torch.cat(hashes)


def _hash(blocks: Tensor, keys: Tensor) -> Tensor:
    wide = blocks.to(torch.int64)
    return torch.stack([(wide * key).sum(1) for key in keys], 1)


def as_words(tensor: Tensor) -> Tensor | None:
    """Return a view of a contiguous tensor's bytes as 32-bit words, or None where they are not aligned."""
    size = tensor.element_size()
    if tensor.is_complex() or (tensor.numel() * size) % 4 or (tensor.storage_offset() * size) % 4:
        return None
    return flat(tensor.detach()).view(torch.int32)


@functools.cache
def process_keys(device: torch.device) -> Tensor:
    """Return this process's secret keys, int64 [KEYS, BLOCK_WORDS], on ``device``."""
    with torch.inference_mode(False):
        return _secret().to(device)


@functools.cache
def _secret() -> Tensor:
    drawn = bytearray(secrets.token_bytes(8 * KEYS * BLOCK_WORDS))
    return torch.frombuffer(drawn, dtype=torch.int64).view(KEYS, BLOCK_WORDS)


def device_hashes(tensor: Tensor) -> Tensor | None:
    """Return the block hashes of a tensor's values in row-major order, on the CPU: int64 [blocks, KEYS].

    Returns None where the bytes cannot be read as 32-bit words.
    """
    words = as_words(plain(tensor))
    return None if words is None else block_hashes(words, process_keys(words.device)).cpu()
