"""Block hashes on the CPU; the function is the same on every device. ``test_digest`` has the GPU test."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlcache_fx.keys import device_digest
from vlcache_fx.keys.device_digest import (
    BLOCK_WORDS,
    CHUNK_BLOCKS,
    KEYS,
    as_words,
    block_hashes,
    device_hashes,
    process_keys,
)

CPU = torch.device("cpu")
SIZES = [0, 1, BLOCK_WORDS - 1, BLOCK_WORDS, BLOCK_WORDS + 1, 3 * BLOCK_WORDS + 17]


def words(count: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count,), generator=draw, dtype=torch.int64).int()


@pytest.mark.parametrize("count", SIZES)
def test_block_hashes_equal_definition(count: int) -> None:
    values, keys = words(count), process_keys(CPU)
    found = block_hashes(values, keys)
    assert found.shape == (max(1, -(-count // BLOCK_WORDS)), KEYS)
    for block, hashes in enumerate(found.tolist()):
        part = values[block * BLOCK_WORDS : (block + 1) * BLOCK_WORDS].tolist()
        for row, value in zip(keys.tolist(), hashes, strict=True):
            total = sum(word * key for word, key in zip(part, row, strict=False))
            assert (total - value) % 2**64 == 0


@given(st.integers(0, 2 * BLOCK_WORDS + 4), st.integers(0, 31), st.integers(0, 2**16))
def test_block_hashes_depend_on_every_bit(place: int, bit: int, seed: int) -> None:
    values = words(2 * BLOCK_WORDS + 5, seed)
    other = values.clone()
    other[place] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    before, after = (block_hashes(one, process_keys(CPU)) for one in (values, other))
    differs = (before != after).all(1).tolist()
    assert differs == [block == place // BLOCK_WORDS for block in range(3)]


def test_block_hashes_depend_on_order() -> None:
    values = words(2 * BLOCK_WORDS)
    swapped = values.view(2, -1).flip(0).flatten()
    keys = process_keys(CPU)
    assert torch.equal(block_hashes(values, keys).flip(0), block_hashes(swapped, keys))
    turned = torch.cat([values[1:2], values[:1], values[2:]])
    assert not torch.equal(block_hashes(values, keys), block_hashes(turned, keys))


def test_block_hashes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values, keys = words(5 * BLOCK_WORDS + 3), process_keys(CPU)
    assert CHUNK_BLOCKS > 6
    at_once = block_hashes(values, keys)
    monkeypatch.setattr(device_digest, "CHUNK_BLOCKS", 2)
    assert torch.equal(block_hashes(values, keys), at_once)


def test_device_hashes_ignore_layout() -> None:
    tensor = torch.randn(40, 300)
    assert torch.equal(device_hashes(tensor), device_hashes(tensor.t().contiguous().t()))
    assert torch.equal(device_hashes(tensor), device_hashes(torch.cat([tensor, tensor])[40:]))
    assert not torch.equal(device_hashes(tensor), device_hashes(-tensor))
    assert torch.equal(device_hashes(tensor), device_hashes(tensor.neg()._neg_view()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.bool])
def test_as_words_shares_memory(dtype: torch.dtype) -> None:
    tensor = torch.arange(8).to(dtype)
    found = as_words(tensor)
    assert found is not None
    assert found.data_ptr() == tensor.data_ptr()
    assert found.numel() * 4 == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, dtype=torch.bfloat16),
        torch.zeros(9, dtype=torch.bfloat16)[1:],
        torch.zeros(4, dtype=torch.complex64),
    ],
    ids=["half a word", "unaligned offset", "complex"],
)
def test_as_words_unaligned(tensor: torch.Tensor) -> None:
    assert as_words(tensor) is None
    assert device_hashes(tensor) is None


def test_process_keys_are_random_and_cached() -> None:
    keys = process_keys(CPU)
    assert keys is process_keys(CPU)
    assert keys.shape == (KEYS, BLOCK_WORDS)
    assert len(set(keys.flatten().tolist())) == keys.numel()
    assert keys.min() < -(2**62)
    assert keys.max() > 2**62
