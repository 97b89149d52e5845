"""BLAKE3 by steps equals the blake3 package."""

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from vlcache_fx.keys.tree_hash import CHUNK_BYTES, tree_digest

from .blake3_steps import TorchSteps


def some_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def check(data: torch.Tensor) -> None:
    assert tree_digest(data, TorchSteps()).numpy().tobytes() == blake3(data.numpy().data).digest()


@pytest.mark.parametrize(
    "nbytes", [1, 3, 63, 64, 65, 128, 1023, 1024, 1025, 2048, 2049, 3 * 1024, 5 * 1024 + 7]
)
def test_tree_digest_equals_blake3(nbytes: int) -> None:
    check(some_bytes(nbytes))


@given(st.integers(0, 70), st.integers(1, CHUNK_BYTES), st.integers(0, 2**16))
def test_tree_digest_of_any_length(chunks: int, rest: int, seed: int) -> None:
    check(some_bytes(chunks * CHUNK_BYTES + rest, seed))


def test_tree_digest_reads_no_bytes_behind_the_data() -> None:
    whole = some_bytes(4 * CHUNK_BYTES)
    check(whole[4 : 2 * CHUNK_BYTES + 100])
