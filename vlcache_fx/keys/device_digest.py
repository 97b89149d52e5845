"""A digest of tensors on a device that leaves their bytes there: a keyed hash of blocks, at memory speed.

Copying a photo's features to the host and hashing them there takes longer than a warm prefill. Each block is
hashed on the device by a random linear map with a secret key that this process draws (multilinear hashing;
Lemire and Kaser, arXiv 1202.4961); only the hashes, a five-hundredth of the bytes, go to the host. Whatever
two different contents are, they share the hashes of a block with a chance of at most 2**-128 over the draw of
the key, and nobody outside the process knows the key. Other processes have other keys: such a digest is good
for stores of this process.
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
"""Hashes of a block, 64 bits each."""

CHUNK_BLOCKS = 2048
"""Blocks that are hashed at a time: bounds the scratch memory to about 150 MB."""


def block_hashes(words: Tensor, keys: Tensor) -> Tensor:
    """Hash every block of ``words``.

    Args:
        words: int32 [words], contiguous; what is missing at the end of the last block counts as zeros, so
            lengths must be compared apart.
        keys: int64 [KEYS, BLOCK_WORDS], random, on the same device.

    Returns:
        int64 [blocks, KEYS]: sums of the products of words and keys, modulo 2**64.
    """
    blocks, rest = divmod(words.numel(), BLOCK_WORDS)
    whole = words[: blocks * BLOCK_WORDS].view(blocks, BLOCK_WORDS)
    parts = list(torch.split(whole, CHUNK_BLOCKS)) if blocks else []
    found = [_hashed(part, keys) for part in parts]
    if rest or not blocks:
        found.append(_hashed(words[blocks * BLOCK_WORDS :].view(1, rest), keys[:, :rest]))
    return torch.cat(found)


def _hashed(blocks: Tensor, keys: Tensor) -> Tensor:
    wide = blocks.to(torch.int64)
    return torch.stack([(wide * key).sum(1) for key in keys], 1)


def as_words(tensor: Tensor) -> Tensor | None:
    """The bytes of a contiguous tensor as 32-bit words, sharing its memory; None where they are none."""
    size = tensor.element_size()
    if tensor.is_complex() or (tensor.numel() * size) % 4 or (tensor.storage_offset() * size) % 4:
        return None
    return flat(tensor.detach()).view(torch.int32)


@functools.cache
def process_keys(device: torch.device) -> Tensor:
    """This process's secret keys, int64 [KEYS, BLOCK_WORDS], on ``device``."""
    with torch.inference_mode(False):
        return _secret().to(device)


@functools.cache
def _secret() -> Tensor:
    drawn = bytearray(secrets.token_bytes(8 * KEYS * BLOCK_WORDS))
    return torch.frombuffer(drawn, dtype=torch.int64).view(KEYS, BLOCK_WORDS)


def device_hashes(tensor: Tensor) -> Tensor | None:
    """The block hashes of a tensor's values in row-major order, on the CPU: int64 [blocks, KEYS].

    None where its bytes cannot be read as words on its device.
    """
    words = as_words(plain(tensor))
    return None if words is None else block_hashes(words, process_keys(words.device)).cpu()
