"""Grids of digits as pictures: one 8x8 scan per cell, tinted like a spreadsheet.

Red falls from row to row and green from column to column: a cell's pixels encode its position. The digit is
dark, mostly in blue. A cell is 8x8 pixels, one vision token of the reference model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vlcache_fx.testing.reference_vlm.scans import FloatArray

if TYPE_CHECKING:
    from PIL.Image import Image

CELL_PIXELS = 8
MIN_ROWS, MAX_ROWS = 10, 12
COLUMNS = 10
TINT_STEP = 13
INK_DEPTH = (90.0, 90.0, 230.0)

ByteArray = npt.NDArray[np.uint8]


def render_grids(ink: FloatArray) -> ByteArray:
    """Turn ``ink [n, rows, columns, 8, 8]`` (0..1) into RGB pixels ``[n, rows * 8, columns * 8, 3]``."""
    count, rows, columns = ink.shape[:3]
    paper = np.full((rows, columns, 3), 255.0, np.float32)
    paper[..., 0] -= TINT_STEP * np.arange(rows, dtype=np.float32)[:, None]
    paper[..., 1] -= TINT_STEP * np.arange(columns, dtype=np.float32)[None, :]
    depth = np.asarray(INK_DEPTH, np.float32)
    cells = paper[None, :, :, None, None, :] - ink[..., None] * depth
    pixels = cells.transpose(0, 1, 3, 2, 4, 5).reshape(count, rows * CELL_PIXELS, columns * CELL_PIXELS, 3)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def grid_image(ink: FloatArray) -> Image:
    """Turn ``ink [rows, columns, 8, 8]`` (0..1) into an RGB picture, ``columns * 8`` pixels wide."""
    from PIL import Image

    return Image.fromarray(render_grids(ink[None])[0], "RGB")
