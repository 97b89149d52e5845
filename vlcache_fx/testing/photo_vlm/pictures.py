"""Small pictures of ten kinds, and boards of them: every cell shows one picture, enlarged to a tile.

``vlcache_fx_models`` ships 147 drawings (NOTICE.md has their licences), none of them training data: 98 are
the split ``"test"``, 49 by another artist the split ``"train"``, for calibration. Training uses photographs
of the same kinds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vlcache_fx.testing.assets import find_assets
from vlcache_fx.testing.photo_vlm.words import CLASSES

if TYPE_CHECKING:
    from PIL.Image import Image

SHEET, LABELS = "pictures.webp", "pictures.json"
SPLITS = ("train", "test")
PHOTO_PIXELS, TILE_PIXELS = 32, 128

IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Photos:
    """Photographs: ``pixels [n, 32, 32, 3]`` as bytes, ``labels [n]`` as indices into ``CLASSES``."""

    pixels: ByteArray
    labels: IntArray

    def of_class(self, kind: int) -> IntArray:
        """Return the indices of label ``kind``."""
        return np.flatnonzero(self.labels == kind).astype(np.int64)


@lru_cache(maxsize=len(SPLITS))
def load_pictures(split: str) -> Photos:
    """Return the shipped pictures of ``"test"`` (98) or ``"train"`` (49); none is in both.

    Raises:
        ValueError: an unknown split.
        MissingAssetsError: ``vlcache_fx_models`` is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not valid: it must be one of {', '.join(SPLITS)}")
    from PIL import Image

    folder = find_assets("photo_vlm")
    with Image.open(folder / SHEET) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    rows, columns = pixels.shape[0] // PHOTO_PIXELS, pixels.shape[1] // PHOTO_PIXELS
    pixels = pixels.reshape(rows, PHOTO_PIXELS, columns, PHOTO_PIXELS, 3).transpose(0, 2, 1, 3, 4)
    pixels = pixels.reshape(-1, PHOTO_PIXELS, PHOTO_PIXELS, 3)
    listed = json.loads((folder / LABELS).read_text(encoding="utf-8"))["pictures"]
    chosen = [index for index, picture in enumerate(listed) if picture["split"] == split]
    labels = np.array([CLASSES.index(listed[index]["kind"]) for index in chosen], np.int64)
    return Photos(pixels[chosen], labels)


def enlarge(photo: ByteArray) -> ByteArray:
    """Enlarge one picture ``[32, 32, 3]`` to a tile ``[128, 128, 3]``."""
    from PIL import Image

    size = (TILE_PIXELS, TILE_PIXELS)
    return np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC))


def board_image(photos: ByteArray) -> Image:
    """Combine small pictures ``[rows, columns, 32, 32, 3]`` into one RGB picture of tiles."""
    from PIL import Image

    lines = [np.concatenate([enlarge(photo) for photo in line], axis=1) for line in photos]
    return Image.fromarray(np.concatenate(lines, axis=0))
