"""The steps of ``tree_hash`` as Triton kernels. Needs Triton, which PyTorch for CUDA brings along.

A lane hashes one chunk, or joins one pair; all words are in its registers. Import this module inside
functions only.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: RUF005 - Triton joins tuples with + alone

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vlcache_fx.keys.tree_hash import BLOCK_BYTES, CHUNK_END, CHUNK_START, PARENT

LANES = 128
"""Chunks or pairs per program."""

_START, _END = tl.constexpr(CHUNK_START), tl.constexpr(CHUNK_END)


@triton.jit
def _mix(a, b, c, d, x, y):
    a = a + b + x
    d = d ^ a
    d = (d >> 16) | (d << 16)
    c = c + d
    b = b ^ c
    b = (b >> 12) | (b << 20)
    a = a + b + y
    d = d ^ a
    d = (d >> 8) | (d << 24)
    c = c + d
    b = b ^ c
    b = (b >> 7) | (b << 25)
    return a, b, c, d


@triton.jit
def _round(v, m):
    v0, v4, v8, v12 = _mix(v[0], v[4], v[8], v[12], m[0], m[1])
    v1, v5, v9, v13 = _mix(v[1], v[5], v[9], v[13], m[2], m[3])
    v2, v6, v10, v14 = _mix(v[2], v[6], v[10], v[14], m[4], m[5])
    v3, v7, v11, v15 = _mix(v[3], v[7], v[11], v[15], m[6], m[7])
    v0, v5, v10, v15 = _mix(v0, v5, v10, v15, m[8], m[9])
    v1, v6, v11, v12 = _mix(v1, v6, v11, v12, m[10], m[11])
    v2, v7, v8, v13 = _mix(v2, v7, v8, v13, m[12], m[13])
    v3, v4, v9, v14 = _mix(v3, v4, v9, v14, m[14], m[15])
    return v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15


@triton.jit
def _permuted(m):
    a = (m[2], m[6], m[3], m[10], m[7], m[0], m[4], m[13])
    return a + (m[1], m[11], m[12], m[5], m[9], m[14], m[15], m[8])


@triton.jit
def _word(words, at, mask):
    return tl.load(words + at, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _half_block(w, at, mask):
    a, b, c = _word(w, at, mask), _word(w, at + 1, mask), _word(w, at + 2, mask)
    d, e, f = _word(w, at + 3, mask), _word(w, at + 4, mask), _word(w, at + 5, mask)
    return a, b, c, d, e, f, _word(w, at + 6, mask), _word(w, at + 7, mask)


@triton.jit
def _same(lanes, value):
    return tl.full(lanes.shape, value, tl.uint32)


@triton.jit
def _half_iv(lanes):
    a, b = _same(lanes, 0x6A09E667), _same(lanes, 0xBB67AE85)
    return a, b, _same(lanes, 0x3C6EF372), _same(lanes, 0xA54FF53A)


@triton.jit
def _iv(lanes):
    a, b = _same(lanes, 0x510E527F), _same(lanes, 0x9B05688C)
    return _half_iv(lanes) + (a, b, _same(lanes, 0x1F83D9AB), _same(lanes, 0x5BE0CD19))


@triton.jit
def _compressed(c, m, counter, length, flags):
    """Return the chaining value that follows ``c`` behind the block of the 16 words ``m``."""
    low, zero = counter.to(tl.uint32), _same(counter, 0)
    v = c + _half_iv(counter) + (low, zero, zero + length.to(tl.uint32), zero + flags.to(tl.uint32))
    for _ in range(7):  # not unrolled: compiling seven rounds takes ten times as long
        v = _round(v, m)
        m = _permuted(m)
    a, b, c, d = v[0] ^ v[8], v[1] ^ v[9], v[2] ^ v[10], v[3] ^ v[11]
    return a, b, c, d, v[4] ^ v[12], v[5] ^ v[13], v[6] ^ v[14], v[7] ^ v[15]


@triton.jit
def _store(values, lanes, mask, c):
    for word in tl.static_range(8):
        tl.store(values + lanes * 8 + word, c[word].to(tl.int32, bitcast=True), mask=mask)


# One compilation each, not one per kind of integer: a new length must not compile within a request.
@triton.jit(
    do_not_specialize=["count", "first", "used_bytes", "flags"],
    do_not_specialize_on_alignment=["words", "values"],
)
def _chunks(words, values, count, first, used_bytes, flags, size: tl.constexpr):
    lanes = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    mask = lanes < count
    blocks = (used_bytes + 63) // 64
    c = _iv(lanes)
    for block in range(blocks):
        length = tl.minimum(used_bytes - block * 64, 64)
        of_block = tl.where(block == 0, _START, 0) + tl.where(block == blocks - 1, flags + _END, 0)
        at = lanes * 256 + block * 16
        m = _half_block(words, at, mask) + _half_block(words, at + 8, mask)
        c = _compressed(c, m, lanes + first, length, of_block)
    _store(values, lanes, mask, c)


@triton.jit(
    do_not_specialize=["count", "length", "flags"], do_not_specialize_on_alignment=["values", "joined"]
)
def _pairs(values, joined, count, length, flags, size: tl.constexpr):
    lanes = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    mask = lanes * 2 < count
    has_partner = lanes * 2 + 1 < count
    left = _half_block(values, lanes * 16, mask)
    right = _half_block(values, lanes * 16 + 8, has_partner)
    c = _compressed(_iv(lanes), left + right, lanes * 0, length, flags)
    _store(joined, lanes, has_partner, c)
    _store(joined, lanes, mask & (lanes * 2 + 1 == count), left)


class TritonSteps:
    """The steps of ``tree_hash`` on the current device."""

    def chunks(self, words: Tensor, values: Tensor, first: int, used_bytes: int, flags: int) -> None:
        """Hash chunks; see ``Steps``."""
        count = len(values)
        _chunks[_grid(count)](words, values, count, first, used_bytes, flags, LANES)

    def pairs(self, values: Tensor, joined: Tensor, flags: int) -> None:
        """Join values; see ``Steps``."""
        _pairs[_grid(len(joined))](values, joined, len(values), BLOCK_BYTES, flags + PARENT, LANES)


def _grid(lanes: int) -> tuple[int]:
    return (-(-lanes // LANES),)
