"""``torch.ops.vlcache.causal_conv1d``: the short convolution over tokens in front of recurrent layers."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["causal_conv1d", "causal_conv1d_reference"]


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
