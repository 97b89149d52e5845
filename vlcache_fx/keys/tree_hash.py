"""BLAKE3 as a tree of steps that a device can run side by side.

BLAKE3 cuts its input into chunks of 1,024 bytes. Each chunk is hashed to a chaining value of eight 32-bit
words; pairs of values are joined, level by level, until one is left. A last value without a partner moves up
unchanged. This gives the tree of the specification, whose left subtrees are the largest powers of two
(https://github.com/BLAKE3-team/BLAKE3-specs, section 2.1).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

CHUNK_BYTES = 1024
BLOCK_BYTES = 64
"""Bytes of one compression; a chunk has up to 16 of them."""

WORDS = 8
"""32-bit words of a chaining value, and of a digest."""

CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8
"""Flags of a compression."""

IV = (
    0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19,
)  # fmt: skip
"""First chaining value of a chunk, and of a pair."""

PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
"""Order of a block's words in the next of the seven rounds."""


class Steps(Protocol):
    """The two steps of the tree. All tensors are int32, contiguous and on one device."""

    def chunks(self, words: Tensor, values: Tensor, first: int, used_bytes: int, flags: int) -> None:
        """Hash chunks.

        Args:
            words: [chunks, 256], the bytes as little-endian words.
            values: [chunks, 8], to be written.
            first: number of the first chunk in the input.
            used_bytes: bytes of each chunk that count, 1 to 1,024; the others are zero.
            flags: for the last block of each chunk, ``ROOT`` or 0.
        """

    def pairs(self, values: Tensor, joined: Tensor, flags: int) -> None:
        """Join each two values; copy the last one where it has no partner.

        Args:
            values: [n, 8].
            joined: [ceil(n / 2), 8], to be written.
            flags: for all pairs, ``ROOT`` or 0.
        """


def tree_digest(data: Tensor, steps: Steps) -> Tensor:
    """Return the BLAKE3 digest of bytes as eight little-endian words, int32 [8], on the device of ``data``.

    Args:
        data: uint8 [n], contiguous, n >= 1. Its memory begins at a multiple of four bytes.
        steps: computes the steps.
    """
    whole, rest = divmod(data.numel(), CHUNK_BYTES)
    values = data.new_empty((whole + bool(rest), WORDS), dtype=torch.int32)
    flags = ROOT if len(values) == 1 else 0
    if whole:
        words = data[: whole * CHUNK_BYTES].view(torch.int32).view(whole, -1)
        steps.chunks(words, values[:whole], 0, CHUNK_BYTES, flags)
    if rest:  # a copy, because the bytes behind the tensor's belong to others
        tail = data.new_zeros(CHUNK_BYTES)
        tail[:rest] = data[whole * CHUNK_BYTES :]
        steps.chunks(tail.view(torch.int32).view(1, -1), values[whole:], whole, rest, flags)
    while len(values) > 1:
        joined = values.new_empty((-(-len(values) // 2), WORDS))
        steps.pairs(values, joined, ROOT if len(values) == 2 else 0)
        values = joined
    return values[0]
