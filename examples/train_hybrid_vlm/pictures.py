"""Vision tokens of training pictures, on the training device: scans -> patches -> the frozen tower."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from examples.train_hybrid_vlm.decoder import products_in
from examples.train_reference_vlm.training import augment
from vlcache_fx.testing.reference_vlm.images import CELL_PIXELS, COLUMNS, INK_DEPTH, TINT_STEP
from vlcache_fx.testing.reference_vlm.scans import Scans


class Pictures:
    """Draws pictures of scans and encodes them; one tower call for many pictures of one size.

    ``ink [variants, scans, 8, 8]`` holds each scan as augmented a few times.
    """

    def __init__(self, tower: Any, scans: Scans, seed: int, variants: int = 8) -> None:
        rng = np.random.default_rng([seed, 2])
        ink = np.stack([augment(rng, scans.ink) for _ in range(variants)])
        self.tower, self.patch = tower, int(tower.config.patch_size)
        self.ink = torch.from_numpy(ink).to(tower.device)
        self.depth = torch.tensor(INK_DEPTH, device=tower.device)
        self.places: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def features(self, scans: Tensor, precision: torch.dtype) -> Tensor:
        """Vision tokens ``[n, rows * columns, hidden]`` of pictures of ``scans [n, rows, columns]``."""
        variant = torch.randint(len(self.ink), scans.shape, device=scans.device)
        count, rows, _ = scans.shape
        patches = self.patches(self.ink[variant, scans.long()])
        with torch.no_grad(), products_in(precision, patches.device):
            return self.encode(patches.view(count, -1, patches.shape[-1]), rows).float()

    def patches(self, ink: Tensor) -> Tensor:
        """[n, rows, columns, 8, 8] ink -> [patches, values], as ``render_grids`` and ``patchify``."""
        count, rows, columns = ink.shape[:3]
        paper = torch.full((rows, columns, 3), 255.0, device=ink.device)
        paper[..., 0] -= TINT_STEP * torch.arange(rows, device=ink.device)[:, None]
        paper[..., 1] -= TINT_STEP * torch.arange(columns, device=ink.device)
        pixels = paper[:, :, None, None, :] - ink[..., None] * self.depth
        pixels = pixels.round().clamp(0, 255) / 127.5 - 1.0
        side = CELL_PIXELS // self.patch
        pixels = pixels.view(count, rows, columns, side, self.patch, side, self.patch, 3)
        pixels = pixels.permute(0, 1, 2, 3, 5, 7, 4, 6)[..., None, :, :]
        wide = pixels.expand(*pixels.shape[:-3], int(self.tower.config.temporal_patch_size), -1, -1)
        return wide.reshape(count * rows * columns * side * side, -1)

    def encode(self, patches: Tensor, rows: int) -> Tensor:
        """[n, patches, values] -> [n, tokens, hidden], as the tower for pictures of ``rows`` rows."""
        tower = self.tower
        if rows not in self.places:
            self.places[rows] = self._places(rows)
        places, cos, sin = self.places[rows]
        weight = tower.patch_embed.proj.weight
        x = F.linear(patches, weight.flatten(1), tower.patch_embed.proj.bias) + places
        for block in tower.blocks:
            x = x + _attend(block.attn, block.norm1(x), cos, sin)
            x = x + block.mlp(block.norm2(x))
        features: Tensor = tower.merger(x.flatten(0, 1)).unflatten(0, (len(patches), -1))
        return features

    def _places(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Learned places of a picture's patches [patches, hidden], and their rotations [patches, d]."""
        tower, merge = self.tower, int(self.tower.spatial_merge_size)
        grid = torch.tensor([[1, rows * merge, COLUMNS * merge]], device=tower.device)
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
            kwargs={},
        )
        with torch.no_grad(), torch.autocast(grid.device.type, enabled=False):
            places = (tower.pos_embed(indices) * weights[:, :, None]).sum(1)
            cos, sin = tower.rotary_pos_emb(places, get_vision_position_ids(grid, merge, kwargs={}))
        return places, cos.float(), sin.float()


def _attend(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What a ``Qwen3_5VisionAttention`` returns: each picture of ``x [n, patches, hidden]`` by itself."""
    query, key, value = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    turned = []
    for part in (query, key):
        left, right = part.float().chunk(2, -1)
        turned.append((part.float() * cos + torch.cat([-right, left], -1) * sin).to(value.dtype))
    rows = F.scaled_dot_product_attention(turned[0], turned[1], value, scale=layer.scaling)
    result: Tensor = layer.proj(rows.transpose(1, 2).flatten(-2))
    return result
