"""``torch.ops.vlcache.causal_conv1d``: the short convolution over tokens in front of recurrent layers."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["causal_conv1d", "causal_conv1d_reference", "decompose_causal_conv1d"]

MAX_SUMS = 8
"""Widest convolution that is decomposed."""


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, before: Tensor | None = None
) -> Tensor:
    """Convolve each channel with the tokens up to its own.

    Args:
        x: [batch, channels, tokens].
        weight: [channels, 1, width].
        bias: [channels], or None.
        before: [batch, channels, n], the values of earlier tokens; zeros stand before them, and for None.

    Returns:
        [batch, channels, tokens].
    """
    channels, _, width = weight.shape
    joined = x if before is None else torch.cat([before, x], -1)
    padded = F.pad(joined, (width - 1, 0))
    rows = F.conv1d(padded, weight, bias, groups=channels)
    return rows[..., rows.shape[-1] - x.shape[-1] :].contiguous()


@torch.library.custom_op("vlcache::causal_conv1d", mutates_args=())
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, before: Tensor | None = None
) -> Tensor:
    """See ``causal_conv1d_reference``."""
    return causal_conv1d_reference(x, weight, bias, before)


@causal_conv1d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None, before: Tensor | None = None) -> Tensor:  # noqa: ARG001 (the schema)
    return x.new_empty(x.shape)


def decompose_causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, before: Tensor | None = None
) -> Any:
    """Return ``vlcache.causal_conv1d`` as a sum of shifted products, or NotImplemented if it is wide.

    Compilers fuse the sum with the activation behind it, token by token, as projections lay rows out. A
    convolution of PyTorch copies its input to lay it out by channels, and its result back.
    """
    width, tokens = weight.shape[-1], x.shape[-1]
    if width > MAX_SUMS:
        return NotImplemented
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.transpose(1, 2)
    joined = rows if before is None else torch.cat([before.transpose(1, 2), rows], 1)
    first = joined.shape[1] - tokens
    padded = F.pad(joined, (0, 0, width - 1, 0))
    total = None if bias is None else bias.to(wide)
    for offset in range(width):
        taps = weight[:, 0, offset].to(wide)
        part = padded[:, first + offset : first + offset + tokens].to(wide) * taps
        total = part if total is None else total + part
    assert total is not None  # a convolution has a width
    return total.to(x.dtype).transpose(1, 2).contiguous()
