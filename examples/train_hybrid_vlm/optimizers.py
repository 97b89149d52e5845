"""Muon for many matrices at once: few operators, so that a GPU is not kept waiting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.775, 2.0315)
STEPS = 5


class BatchedMuon(torch.optim.Optimizer):
    """``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"``, matrices of a shape in one batch."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.01, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.shapes: list[dict[torch.Size, list[Tensor]]] = []
        self.buffers: list[dict[torch.Size, Tensor]] = []
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                shapes[weight.shape].append(weight)
            self.shapes.append(dict(shapes))
            self.buffers.append(
                {shape: torch.zeros_like(torch.stack(some)) for shape, some in shapes.items()}
            )

    @torch.no_grad()
    def step(self, _closure: Any = None) -> None:  # type: ignore[override]
        """Update all matrices."""
        for group, shapes, buffers in zip(self.param_groups, self.shapes, self.buffers, strict=True):
            for shape, weights in shapes.items():
                grads = torch.stack([weight.grad for weight in weights if weight.grad is not None])
                buffers[shape].lerp_(grads, 1.0 - group["momentum"])
                update = orthogonal(grads.lerp(buffers[shape], group["momentum"])).float()
                torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
                scale = -group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_add_(weights, list(update.unbind()), alpha=scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Newton-Schulz iterations of ``matrices [n, rows, columns]`` in bfloat16 (Jordan, Muon, 2024)."""
    first, second, third = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16().mT if tall else matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=second, alpha=third)
        x = torch.baddbmm(x, gram, x, beta=first)
    return x.mT if tall else x
