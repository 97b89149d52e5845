import torch

from vlcache_fx.bench.machine import describe_machine, faster_dtype
from vlcache_fx.bench.photos import grid_of
from vlcache_fx.bench.ttft import TINY, Shape


def test_the_demo_says_which_grid_its_photo_gets() -> None:
    width, height = 640, 427  # the first photo's
    for shape in (TINY, Shape()):
        assert grid_of(shape.grid[0] * shape.grid[1], width / height) == shape.grid


def test_a_dtype_is_chosen() -> None:
    assert faster_dtype(16, 16) in (torch.float32, torch.bfloat16)


def test_the_machine_is_named() -> None:
    machine = describe_machine()
    assert machine.processor
    assert machine.cores >= 1
