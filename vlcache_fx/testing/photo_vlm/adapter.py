"""The trained parts: a projector from EfficientNet features to word embeddings, and low-rank updates."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlcache_fx.testing.photo_vlm.words import MAX_CELLS

FEATURES, HIDDEN, WIDTH = 1280, 384, 576
TILE_TOKENS = 4
RANKS = {
    "q_proj": 16,
    "k_proj": 16,
    "v_proj": 16,
    "o_proj": 16,
    "gate_proj": 4,
    "up_proj": 4,
    "down_proj": 4,
}
"""Rank of the update of each linear map of a decoder layer."""

UPDATE_SCALE = 2.0


class Projector(nn.Module):
    """Maps each vision token and the mean of its tile to a word embedding, and adds the tile's position."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.narrow = nn.Linear(2 * FEATURES, HIDDEN)
        self.widen = nn.Linear(HIDDEN, WIDTH)
        self.rows = nn.Parameter(torch.zeros(MAX_CELLS, WIDTH))
        self.columns = nn.Parameter(torch.zeros(MAX_CELLS, WIDTH))

    def content(self, features: Tensor) -> Tensor:
        """Map features ``[..., TILE_TOKENS, FEATURES]`` of tiles to ``[..., TILE_TOKENS, WIDTH]``."""
        tokens = self.norm(features)
        whole = tokens.mean(-2, keepdim=True).expand_as(tokens)
        projected: Tensor = self.widen(F.gelu(self.narrow(torch.cat([tokens, whole], -1))))
        return projected

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[images, rows, columns, TILE_TOKENS, FEATURES]`` to ``[images, tokens, WIDTH]``, by tile."""
        images, rows, columns = features.shape[:3]
        positions = self.rows[:rows, None] + self.columns[None, :columns]
        return (self.content(features) + positions[None, :, :, None]).reshape(images, -1, WIDTH)


def adapted_maps(decoder: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Return the adapted maps of the decoder: name, parent module, and attribute name."""
    found: list[tuple[str, nn.Module, str]] = []
    for name, module in decoder.named_modules():
        found.extend((f"{name}.{key}", module, key) for key in RANKS if hasattr(module, key))
    return found


def merge_updates(decoder: Any, factors: dict[str, Tensor]) -> None:
    """Add saved updates to the weights of ``decoder``.

    Raises:
        KeyError: the factors belong to another decoder.
    """
    with torch.no_grad():
        for name, module, key in adapted_maps(decoder):
            weight = getattr(module, key).weight
            down, up = factors[f"{name}.down"].float(), factors[f"{name}.up"].float()
            weight += (UPDATE_SCALE * up @ down).to(weight.dtype)
