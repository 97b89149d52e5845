import numpy as np
import pytest

from vlcache_fx.bench.photos import Patches, grid_of, patches_of, squares_of, take_photos
from vlcache_fx.errors import OptionError


@pytest.mark.parametrize("tokens", [1, 7, 120, 1024, 2668, 4096, 16384, 32768])
def test_grid_of_number_and_aspect(tokens: int) -> None:
    rows, columns = grid_of(tokens, 1.5)
    assert abs(rows * columns - tokens) <= 0.02 * tokens
    if tokens > 100:
        assert 1.5 / 2.6 < columns / rows < 1.5 * 2.6


@pytest.mark.parametrize(("tokens", "grid"), [(120, (8, 15)), (2668, (46, 58))])
def test_grid_of_the_photo_in_the_demo(tokens: int, grid: tuple[int, int]) -> None:
    (photo,) = take_photos(1)
    assert grid_of(tokens, photo.width / photo.height) == grid


def test_grid_of_no_tokens() -> None:
    with pytest.raises(OptionError, match="vision_tokens=0"):
        grid_of(0, 1.5)


def test_take_photos_all_different() -> None:
    pictures = [np.asarray(photo.resize((16, 16))) for photo in take_photos(14)]
    assert len({picture.tobytes() for picture in pictures}) == 14


def test_patches_of_shapes() -> None:
    values, grids = patches_of(take_photos(2), (3, 4), Patches(14, 2, 2))
    assert values.shape == (2 * 3 * 4 * 2**2, 3 * 2 * 14**2)
    assert grids.tolist() == [[1, 6, 8]] * 2
    assert float(values.abs().max()) <= 1


def test_squares_of_shapes() -> None:
    pixels = squares_of(take_photos(2), 24)
    assert pixels.shape == (2, 3, 24, 24)
    assert float(pixels.abs().max()) <= 1
