"""Low-rank updates of the decoder's linear maps while they are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlcache_fx.testing.photo_vlm.adapter import RANKS, UPDATE_SCALE, adapted_maps


class LowRank(nn.Module):
    """A frozen linear map with a trained update of low rank; the update's factors are kept in float32."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        """The map of ``inputs [..., in]`` with the update added."""
        down, up = self.down.to(inputs.dtype), (UPDATE_SCALE * self.up).to(inputs.dtype)
        updated: Tensor = self.base(inputs) + F.linear(F.linear(inputs, down), up)
        return updated


def add_updates(decoder: nn.Module) -> dict[str, LowRank]:
    """Wrap the linear maps of ``decoder``'s layers; return the wrappers by name."""
    wrapped = {}
    for name, module, key in adapted_maps(decoder):
        wrapped[name] = LowRank(getattr(module, key), RANKS[key])
        setattr(module, key, wrapped[name])
    return wrapped


def updates_of(wrapped: dict[str, LowRank]) -> dict[str, Tensor]:
    """Return the factors of all updates for saving."""
    factors: dict[str, Tensor] = {f"{name}.down": one.down for name, one in wrapped.items()}
    return factors | {f"{name}.up": one.up for name, one in wrapped.items()}
