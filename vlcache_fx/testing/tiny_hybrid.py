"""A tiny vision-language model whose decoder has recurrent layers, in plain torch.

Each letter of ``kinds`` is a layer: ``a`` attention; ``d`` a gated delta rule behind a short convolution, as
in Qwen3.5; ``s`` a state space with a skip, as in Mamba 2; ``c`` a gated short convolution, as in LFM2; ``p``
attention and a state space side by side, as in Falcon-H1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vlcache_fx.ops  # noqa: F401  (defines torch.ops.vlcache)
from vlcache_fx.testing.prompts import seeded
from vlcache_fx.testing.tiny_attention import Attention, DecoderShape, rotary_angles
from vlcache_fx.testing.tiny_vlm import Mlp, TinyDecoder, TinyVlm

HEADS, GROUPS, KEY, VALUE, WIDTH = 4, 2, 6, 8, 4


class ShortConvolution(nn.Module):
    """A depthwise convolution over a token and the three before it."""

    def __init__(self, channels: int, width: int = WIDTH, *, pads: bool = False) -> None:
        super().__init__()
        self.width, self.pads = width, pads
        self.weight = nn.Parameter(torch.randn(channels, 1, width) * width**-0.5)
        self.bias = nn.Parameter(torch.randn(channels) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, channels] -> the same."""
        x = x.transpose(1, 2)
        channels, tokens = x.shape[1:]
        if self.pads:
            x = F.conv1d(F.pad(x, (self.width - 1, 0)), self.weight, self.bias, groups=channels)
        else:
            x = F.conv1d(x, self.weight, self.bias, padding=self.width - 1, groups=channels)[..., :tokens]
        return x.transpose(1, 2)


class DeltaRule(nn.Module):
    """A gated delta rule behind a short convolution."""

    def __init__(self, hidden: int, *, delta: bool = True) -> None:
        super().__init__()
        self.delta = delta
        self.sizes = [GROUPS * KEY, GROUPS * KEY, HEADS * VALUE]
        self.qkv = nn.Linear(hidden, sum(self.sizes), bias=False)
        self.convolution = ShortConvolution(sum(self.sizes), pads=not delta)
        self.gates = nn.Linear(hidden, 2 * HEADS)
        self.skip = nn.Parameter(torch.randn(HEADS, 1))
        self.z = nn.Linear(hidden, HEADS * VALUE)
        self.out = nn.Linear(HEADS * VALUE, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, hidden] -> the same."""
        batch, tokens, _ = x.shape
        qkv: Tensor = F.silu(self.convolution(self.qkv(x)))
        q, k, v = torch.split(qkv, self.sizes, -1)
        q, k = (part.reshape(batch, tokens, GROUPS, KEY) for part in (q, k))
        v = v.reshape(batch, tokens, HEADS, VALUE)
        decay, beta = self.gates(x).chunk(2, -1)
        decay = -F.softplus(decay)
        if self.delta:
            rows = torch.ops.vlcache.recur(q, k, v, decay, beta.sigmoid(), l2norm=True)[0]
        else:
            rows = torch.ops.vlcache.recur(q, k, v * beta.exp()[..., None], decay)[0] + self.skip * v
        result: Tensor = self.out(rows.reshape(batch, tokens, -1) * F.silu(self.z(x)))
        return result


class GatedConvolution(nn.Module):
    """A short convolution between two gates."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden, 3 * hidden, bias=False)
        self.convolution = ShortConvolution(hidden, 3)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, hidden] -> the same."""
        before, after, x = self.inner(x).chunk(3, -1)
        result: Tensor = self.out(after * self.convolution(before * x))
        return result


class HybridLayer(nn.Module):
    """One decoder layer of a kind; see the module."""

    def __init__(self, shape: DecoderShape, kind: str) -> None:
        super().__init__()
        hidden = shape.hidden
        self.kind, self.mlp = kind, Mlp(shape)
        self.norm_1, self.norm_2 = nn.RMSNorm(hidden, 1e-6), nn.RMSNorm(hidden, 1e-6)
        if kind in "ap":
            self.attention = Attention(shape)
        if kind in "ds":
            self.mixer: nn.Module = DeltaRule(hidden, delta=kind == "d")
        if kind == "p":
            self.mixer = DeltaRule(hidden, delta=False)
        if kind == "c":
            self.mixer = GatedConvolution(hidden)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Compute the residual stream after this layer."""
        normed = self.norm_1(x)
        if self.kind in "ap":
            x = x + self.attention(normed, rotary, None)
        if self.kind != "a":
            x = x + self.mixer(normed)
        result: Tensor = x + self.mlp(self.norm_2(x))
        return result


class HybridDecoder(TinyDecoder):
    """Token embeddings -> logits."""

    def __init__(self, shape: DecoderShape, kinds: str) -> None:
        super().__init__(shape)
        self.layers = nn.ModuleList(HybridLayer(shape, kind) for kind in kinds)

    def forward(self, embeds: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Compute logits of the last token or of all tokens, [1, 1 or tokens, vocabulary]."""
        if position_ids is None:
            position_ids = torch.arange(embeds.shape[1], device=embeds.device)
        x, rotary = embeds, rotary_angles(position_ids, self.shape.rotary_dim)
        for layer in self.layers:
            x = layer(x, rotary)
        if self.shape.last_only:
            x = x[:, -1:]
        logits: Tensor = self.head(self.norm(x))
        return logits


def tiny_hybrid(kinds: str = "dda", *, last_only: bool = True, seed: int = 0) -> TinyVlm:
    """Create a ``TinyVlm`` with these layers, in eval mode.

    Args:
        kinds: a letter per layer, see the module.
        last_only: return logits of the last token alone.
        seed: seed of the weights.
    """
    shape = DecoderShape(num_layers=len(kinds), last_only=last_only)
    with seeded(seed):
        model = TinyVlm(shape)
        model.decoder = HybridDecoder(shape, kinds)
        return model.eval()
