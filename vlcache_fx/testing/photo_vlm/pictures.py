"""Photographs of CIFAR-10, and boards of them: every cell one photograph, enlarged to a tile.

The package ships 600 pictures of CIFAR-10's test batch, which the trained weights have never seen: 400 are
the split ``"test"``, 200 the split ``"train"``, for those who calibrate something before they evaluate it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

ASSETS = Path(__file__).resolve().parent / "assets"
SHEET, LABELS = "photos.webp", "photos.json"
SPLITS = ("train", "test")
TEST_PHOTOS = 400
PHOTO_PIXELS, TILE_PIXELS = 32, 128

IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Photos:
    """Photographs: ``pixels [n, 32, 32, 3]`` as bytes, ``labels [n]`` as indices into ``CLASSES``."""

    pixels: ByteArray
    labels: IntArray

    def of_class(self, kind: int) -> IntArray:
        """Which photographs have the label ``kind``."""
        return np.flatnonzero(self.labels == kind).astype(np.int64)


@lru_cache(maxsize=len(SPLITS))
def load_photos(split: str) -> Photos:
    """Return the shipped photographs of ``"test"`` (400) or ``"train"`` (200); none is in both."""
    if split not in SPLITS:
        raise ValueError(f"split is one of {SPLITS}, not {split!r}")
    from PIL import Image

    with Image.open(ASSETS / SHEET) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    rows, columns = pixels.shape[0] // PHOTO_PIXELS, pixels.shape[1] // PHOTO_PIXELS
    pixels = pixels.reshape(rows, PHOTO_PIXELS, columns, PHOTO_PIXELS, 3).transpose(0, 2, 1, 3, 4)
    pixels = pixels.reshape(-1, PHOTO_PIXELS, PHOTO_PIXELS, 3)
    labels = np.array(json.loads((ASSETS / LABELS).read_text(encoding="utf-8"))["labels"], np.int64)
    chosen = slice(0, TEST_PHOTOS) if split == "test" else slice(TEST_PHOTOS, len(labels))
    return Photos(np.ascontiguousarray(pixels[: len(labels)][chosen]), labels[chosen])


def enlarge(photo: ByteArray) -> ByteArray:
    """Enlarge one photograph ``[32, 32, 3]`` to a tile ``[128, 128, 3]``."""
    from PIL import Image

    size = (TILE_PIXELS, TILE_PIXELS)
    return np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC))


def board_image(photos: ByteArray) -> Image:
    """Turn photographs ``[rows, columns, 32, 32, 3]`` into an RGB picture of tiles."""
    from PIL import Image

    lines = [np.concatenate([enlarge(photo) for photo in line], axis=1) for line in photos]
    return Image.fromarray(np.concatenate(lines, axis=0))
