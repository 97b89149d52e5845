"""Real photos, resized to a number of vision tokens."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlcache_fx.errors import OptionError
from vlcache_fx.testing.reference_vlm.processor import ReferenceImageProcessor

NEAR_ASPECT = 1.5
"""Maximum distortion of a photo, to reach the requested number of tokens."""


@dataclass(frozen=True)
class Patches:
    """Patches of a vision encoder with grids: sizes in pixels, patches and frames."""

    size: int
    merge: int
    frames: int


def load_photos() -> list[Any]:
    """Load the sample photos of scikit-learn and scikit-image as ``PIL`` images."""
    from PIL import Image
    from skimage import data as untyped
    from sklearn.datasets import load_sample_image

    data: Any = untyped
    samples = [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    samples += [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    return [Image.fromarray(sample).convert("RGB") for sample in samples]


def take_photos(count: int) -> list[Any]:
    """Return ``count`` different pictures: the photos, then their left halves, left thirds, ..."""
    photos = load_photos()
    taken = []
    for number in range(count):
        photo, smaller = photos[number % len(photos)], number // len(photos)
        width, height = photo.size
        taken.append(photo.crop((0, 0, math.ceil(width / (1 + smaller)), height)))
    return taken


def grid_of(tokens: int, aspect: float) -> tuple[int, int]:
    """Return rows and columns of a grid of about ``tokens`` cells and ``aspect`` (width / height).

    Raises:
        OptionError: fewer than one token.
    """
    if tokens < 1:
        raise OptionError(f"vision_tokens={tokens} is not valid: it must be a positive integer")
    natural = math.sqrt(tokens / aspect)
    low, high = max(1, math.floor(natural / NEAR_ASPECT)), max(1, math.ceil(natural * NEAR_ASPECT))
    grids = [(rows, max(1, round(tokens / rows))) for rows in range(low, high + 1)]
    return min(grids, key=lambda grid: (abs(grid[0] * grid[1] - tokens), abs(grid[0] - natural)))


def patches_of(photos: list[Any], grid: tuple[int, int], patches: Patches) -> tuple[Tensor, Tensor]:
    """Resize photos to ``grid`` vision tokens each.

    Returns:
        Patches ``[photos * patches, values]``, float32, and grids ``[photos, 3]``.
    """
    rows, columns = grid
    cell = patches.size * patches.merge
    resized = np.stack([np.asarray(photo.resize((columns * cell, rows * cell))) for photo in photos])
    processor = ReferenceImageProcessor(patches.size, patches.merge, patches.frames)
    values, grids = processor.patchify(resized)
    return torch.from_numpy(values), torch.from_numpy(grids)


def squares_of(photos: list[Any], side: int) -> Tensor:
    """Resize photos to squares of ``side`` pixels, float32 ``[photos, 3, side, side]`` in -1..1."""
    resized = np.stack([np.asarray(photo.resize((side, side))) for photo in photos])
    return torch.from_numpy(resized).permute(0, 3, 1, 2).float() / 127.5 - 1.0
