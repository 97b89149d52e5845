"""Layouts of images for encoders that take more than pixels; recognised by the names of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlcache_fx.testing.prompts import noise

GRID = (6, 8)
"""Rows and columns of patches, if the shape is free."""

UNFLATTENED = frozenset({"kimi_k25", "paddleocr_vl"})
"""Families whose patches keep their sides; other encoders take flat patches."""


@dataclass(frozen=True)
class ImageSizes:
    """What the layouts need to know of an encoder.

    Attributes:
        model_type: the family.
        patch: pixels along a side of a patch.
        size: pixels along a side of an image of fixed size.
        channels: of a pixel.
        frames: in a patch.
        merge: patches along a side of a token.
    """

    model_type: str
    patch: int
    size: int
    channels: int
    frames: int
    merge: int


Layout = Callable[[ImageSizes, int], dict[str, Tensor]]


def patches_of_a_grid(sizes: ImageSizes, seed: int) -> dict[str, Tensor]:
    """One row a patch, with the grid's frames, rows and columns."""
    count, channels = GRID[0] * GRID[1], sizes.channels
    if sizes.model_type in UNFLATTENED:
        pixels = noise(seed, count, channels, sizes.patch, sizes.patch)
    else:
        pixels = noise(seed, count, channels * sizes.frames * sizes.patch**2)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, *GRID]])}


def numbered_patches(sizes: ImageSizes, seed: int) -> dict[str, Tensor]:
    """One row a patch in a batch of images: its row and column, counted from 1, and its pixels."""
    rows, columns = (torch.arange(1, 1 + count, dtype=torch.float32) for count in GRID)
    places = torch.cartesian_prod(rows, columns)[None]
    pixels = noise(seed, 1, GRID[0] * GRID[1], sizes.channels * sizes.patch**2)
    return {"flattened_patches": torch.cat([places, pixels], dim=-1)}


def patches_of_an_image(sizes: ImageSizes, seed: int) -> dict[str, Tensor]:
    """One row a patch, with the grid's rows and columns."""
    return {
        "pixel_values": noise(seed, GRID[0] * GRID[1], sizes.channels * sizes.patch**2),
        "image_grid_hw": torch.tensor([GRID]),
    }


def merged_patches(sizes: ImageSizes, seed: int) -> dict[str, Tensor]:
    """As ``patches_of_a_grid``, with the number of patches along a side of each image's tokens."""
    return patches_of_a_grid(sizes, seed) | {"image_merge_sizes": torch.tensor([sizes.merge])}


def padded_patches(sizes: ImageSizes, seed: int) -> dict[str, Tensor]:
    """One row a patch in a batch of images, with the grid of each image and a mask of its patches."""
    count = GRID[0] * GRID[1]
    return {
        "pixel_values": noise(seed, 1, count, sizes.channels * sizes.patch**2),
        "spatial_shapes": torch.tensor([GRID]),
        "pixel_attention_mask": torch.ones(1, count, dtype=torch.long),
    }


def strip_of_patches(sizes: ImageSizes, seed: int) -> dict[str, Tensor]:
    """All patches side by side in one strip, with the rows and columns of each image: merged twice."""
    rows, columns = 8, 12
    return {
        "pixel_values": noise(seed, 1, sizes.channels, sizes.patch, rows * columns * sizes.patch),
        "target_sizes": torch.tensor([[rows, columns]], dtype=torch.int32),
    }


def pooled_patches(sizes: ImageSizes, seed: int) -> dict[str, Tensor]:
    """One row a patch of a crop, with the patches that each token pools, and rows and columns of tokens."""
    side = sizes.size // sizes.patch
    places = torch.arange(side**2).reshape(side // 2, 2, side // 2, 2).transpose(1, 2)
    return {
        "pixel_values": noise(seed, 1, side**2, sizes.channels * sizes.patch**2),
        "image_token_pooling": places.reshape(-1, 4),
        "image_grids": torch.tensor([[side // 2, side // 2, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    }


LAYOUTS: Mapping[str, Layout] = {
    "image_merge_sizes": merged_patches,
    "image_grid_thw": patches_of_a_grid,
    "flattened_patches": numbered_patches,
    "image_grid_hw": patches_of_an_image,
    "spatial_shapes": padded_patches,
    "target_sizes": strip_of_patches,
    "image_token_pooling": pooled_patches,
}
"""Name of an input of the encoder -> layout of an image. The first that fits counts."""
