"""A depthwise causal convolution over tokens in few operators, for training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class CausalConvolution(torch.autograd.Function):
    """``x [batch, tokens, channels]``, ``weight [channels, width]`` -> the shape of ``x``.

    Sums of shifted products: as many operators as the convolution is wide, and no search for an algorithm.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve each token with those before it."""
        tokens, width = x.shape[1], weight.shape[1]
        padded = F.pad(x, (0, 0, width - 1, 0))
        ctx.save_for_backward(padded, weight)
        rows = x * weight[:, -1]
        for tap in range(width - 1):
            rows.addcmul_(padded[:, tap : tap + tokens], weight[:, tap])
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``x`` and ``weight``."""
        padded, weight = ctx.saved_tensors
        tokens, width = grads[0].shape[1], weight.shape[1]
        later = F.pad(grads[0], (0, 0, 0, width - 1))
        rows = grads[0] * weight[:, -1]
        for tap in range(width - 1):
            rows.addcmul_(later[:, width - 1 - tap : width - 1 - tap + tokens], weight[:, tap])
        taps = [(grads[0] * padded[:, tap : tap + tokens]).sum((0, 1)) for tap in range(width)]
        return rows, torch.stack(taps, -1)
