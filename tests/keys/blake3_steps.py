"""The steps of BLAKE3 in plain PyTorch: slow, and the measure of the kernels and of their order."""

from __future__ import annotations

import torch
from torch import Tensor

from vlcache_fx.keys.tree_hash import BLOCK_BYTES, CHUNK_END, CHUNK_START, IV, PARENT, PERMUTATION

MASK = 0xFFFFFFFF
MIXES = (
    (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
    (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14),
)  # fmt: skip


def turn(value: Tensor, bits: int) -> Tensor:
    return ((value >> bits) | (value << (32 - bits))) & MASK


def compress(chain: list[Tensor], m: list[Tensor], counter: Tensor, length: int, flags: int) -> list[Tensor]:
    zero = torch.zeros_like(counter)
    v = [*chain, *(zero + word for word in IV[:4]), counter & MASK, zero, zero + length, zero + flags]
    for _ in range(7):
        for i, (a, b, c, d) in enumerate(MIXES):
            for word, turns in ((m[2 * i], (16, 12)), (m[2 * i + 1], (8, 7))):
                v[a] = (v[a] + v[b] + word) & MASK
                v[d] = turn(v[d] ^ v[a], turns[0])
                v[c] = (v[c] + v[d]) & MASK
                v[b] = turn(v[b] ^ v[c], turns[1])
        m = [m[place] for place in PERMUTATION]
    return [v[i] ^ v[i + 8] for i in range(8)]


def words_of(block: Tensor) -> list[Tensor]:
    return list((block.to(torch.int64) & MASK).unbind(1))


def to_int32(words: list[Tensor]) -> Tensor:
    stacked = torch.stack(words, 1)
    return (stacked - ((stacked >> 31) << 32)).to(torch.int32)


class TorchSteps:
    """Implements ``Steps``."""

    def chunks(self, words: Tensor, values: Tensor, first: int, used_bytes: int, flags: int) -> None:
        counter = torch.arange(first, first + len(words))
        chain = [torch.full_like(counter, word) for word in IV]
        blocks = -(-used_bytes // BLOCK_BYTES)
        for block in range(blocks):
            is_last = block == blocks - 1
            own = (CHUNK_START if block == 0 else 0) | (CHUNK_END | flags if is_last else 0)
            length = used_bytes - block * BLOCK_BYTES if is_last else BLOCK_BYTES
            chain = compress(chain, words_of(words[:, block * 16 : block * 16 + 16]), counter, length, own)
        values.copy_(to_int32(chain))

    def pairs(self, values: Tensor, joined: Tensor, flags: int) -> None:
        pairs = len(values) // 2
        if len(values) % 2:
            joined[-1] = values[-1]
        counter = torch.zeros(pairs, dtype=torch.int64)
        chain = [torch.full_like(counter, word) for word in IV]
        blocks = words_of(values[: 2 * pairs].reshape(pairs, 16))
        joined[:pairs] = to_int32(compress(chain, blocks, counter, BLOCK_BYTES, PARENT | flags))
