import torch

from vlcache_fx.bench.decoder import MERGE, TINY, photo_patches
from vlcache_fx.bench.machine import describe_machine, faster_dtype


def test_the_photo_gives_the_asked_number_of_vision_tokens() -> None:
    patches, grids = photo_patches(TINY.grid)
    assert patches.shape[0] == MERGE**2 * TINY.grid[0] * TINY.grid[1]
    assert grids.tolist() == [[1, MERGE * TINY.grid[0], MERGE * TINY.grid[1]]]


def test_a_dtype_is_chosen() -> None:
    assert faster_dtype(16, 16) in (torch.float32, torch.bfloat16)


def test_the_machine_is_named() -> None:
    machine = describe_machine()
    assert machine.processor
    assert machine.cores >= 1
