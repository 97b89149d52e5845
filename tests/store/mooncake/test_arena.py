"""Regions of shared memory: never two at the same bytes, free when nobody refers to them."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlcache_fx.store.mooncake.arena import ALIGNMENT, Arena, Region, aligned


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5 * ALIGNMENT)), max_size=40))
def test_regions_never_overlap_and_all_memory_comes_back(steps: list[tuple[bool, int]]) -> None:
    arena = Arena(16 * ALIGNMENT)
    held: list[Region] = []
    for releases, nbytes in steps:
        if releases and held:
            held.pop(nbytes % len(held))
            continue
        free = arena.free_bytes()
        region = arena.allocate(nbytes)
        if region is not None:
            assert region.view.nbytes == aligned(nbytes)
            assert arena.free_bytes() == free - aligned(nbytes)
            held.append(region)
        del region
        spans = sorted((each.offset, each.offset + each.view.nbytes) for each in held)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    held.clear()
    assert arena.free_bytes() == arena.nbytes
    assert arena.allocate(arena.nbytes) is not None
    arena.close()


def test_tensors_keep_their_region() -> None:
    arena = Arena(4 * ALIGNMENT)
    region = arena.allocate(4 * ALIGNMENT)
    assert region is not None
    region.view[:8] = torch.tensor([1.5, -2.0]).numpy().tobytes()
    tensor = region.tensor(0, torch.float32, (1, 2))
    kept = tensor[0, 1:]
    del region, tensor
    gc.collect()
    assert arena.free_bytes() == 0
    assert kept.item() == -2.0
    arena.close()
    assert kept.item() == -2.0
    del kept
    gc.collect()
    assert arena.free_bytes() == arena.nbytes


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 0)])
def test_tensors_have_the_shape_that_was_asked_for(shape: tuple[int, ...]) -> None:
    arena = Arena(ALIGNMENT)
    region = arena.allocate(100)
    assert region is not None
    tensor = region.tensor(0, torch.bfloat16, shape)
    assert tensor.shape == shape
    assert tensor.dtype == torch.bfloat16
    arena.close()


def test_a_sealed_arena_lends_nothing() -> None:
    arena = Arena(ALIGNMENT)
    arena.seal()
    assert arena.allocate(1) is None
    arena.close()
