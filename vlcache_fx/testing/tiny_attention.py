"""Attention of the tiny vision-language model, in several notations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class DecoderShape:
    """The structure of a ``TinyDecoder``.

    Attributes:
        num_layers: number of decoder layers.
        hidden: width of the residual stream.
        heads: number of query heads, a multiple of ``kv_heads``.
        kv_heads: number of key and value heads.
        norm: type of all norms of the residual stream.
        norm_place: norms before attention and MLP, after them (on the branch), or after the sum.
        rope: rotary embedding of whole heads, of their first half, of neighbouring pairs (``complex``: with
            complex numbers), or none.
        learned_positions: add an embedding of each token's position to the token embeddings.
        qk_norm: RMSNorm of every query and key head.
        fused_qkv: one projection for queries, keys and values.
        bias: biases in all projections.
        parallel: attention and MLP read the same normalised tokens, and their results are summed.
        explicit_mask: a bool mask computed in the graph, and repeated K/V heads, instead of ``is_causal``.
        attention: one call, explicit products and softmax, or flex attention with a block mask computed in
            ``forward``.
        softcap: bound of the scores' magnitude; not with ``sdpa``.
        sinks: an additional logit per head in the softmax; only with ``math``.
        window: sliding window of some layers, with the token itself; as a mask.
        window_every: the last of this many layers has the window.
        embed_scale: multiply embeddings of tokens and images by the square root of ``hidden``.
        last_only: return only the last token's logits.
    """

    num_layers: int = 2
    hidden: int = 16
    heads: int = 2
    kv_heads: int = 1
    norm: Literal["rms", "layer"] = "rms"
    norm_place: Literal["pre", "branch", "post"] = "pre"
    rope: Literal["full", "partial", "interleaved", "complex", "none"] = "full"
    learned_positions: bool = False
    qk_norm: bool = False
    fused_qkv: bool = False
    bias: bool = False
    parallel: bool = False
    explicit_mask: bool = False
    attention: Literal["sdpa", "math", "flex"] = "sdpa"
    softcap: float | None = None
    sinks: bool = False
    window: int | None = None
    window_every: int = 1
    embed_scale: bool = False
    last_only: bool = True

    def __post_init__(self) -> None:
        if (self.softcap is not None and self.attention == "sdpa") or (
            self.sinks and self.attention != "math"
        ):
            raise ValueError(f"attention={self.attention!r} does not support softcap or sinks")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def rotary_dim(self) -> int:
        """Width of the rotated part of a head."""
        return {"partial": self.head_dim // 2, "none": 0}.get(self.rope, self.head_dim)

    def window_of(self, layer: int) -> int | None:
        """Return the window of a layer; None for all tokens."""
        return self.window if (layer + 1) % self.window_every == 0 else None


class Attention(nn.Module):
    """Causal self-attention with grouped K/V heads."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        kv_width = shape.kv_heads * shape.head_dim
        if shape.fused_qkv:
            self.qkv = nn.Linear(shape.hidden, shape.hidden + 2 * kv_width, bias=shape.bias)
        else:
            self.query = nn.Linear(shape.hidden, shape.hidden, bias=shape.bias)
            self.key = nn.Linear(shape.hidden, kv_width, bias=shape.bias)
            self.value = nn.Linear(shape.hidden, kv_width, bias=shape.bias)
        if shape.qk_norm:
            self.query_norm, self.key_norm = (
                nn.RMSNorm(shape.head_dim, 1e-6),
                nn.RMSNorm(shape.head_dim, 1e-6),
            )
        if shape.sinks:
            self.sinks = nn.Parameter(torch.randn(shape.heads))
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=shape.bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, keys and values, [1, heads, tokens, head_dim], before positions enter."""
        shape = self.shape
        if shape.fused_qkv:
            kv_width = shape.kv_heads * shape.head_dim
            query, key, value = self.qkv(x).split([shape.hidden, kv_width, kv_width], dim=-1)
        else:
            query, key, value = self.query(x), self.key(x), self.value(x)
        query, key, value = (
            part.view(x.shape[0], x.shape[1], -1, shape.head_dim).transpose(1, 2)
            for part in (query, key, value)
        )
        if shape.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Any) -> Tensor:
        """Compute causal self-attention."""
        query, key, value = self.project(x)
        if rotary is not None:
            turn = ROTATIONS[self.shape.rope]
            query, key = turn(query, *rotary), turn(key, *rotary)
        if self.shape.attention == "flex":
            attended = self.flex(query, key, value, mask)
        elif mask is None:
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        else:
            groups = self.shape.heads // self.shape.kv_heads
            key, value = repeat_heads(key, groups), repeat_heads(value, groups)
            if self.shape.attention == "math":
                attended = self.written_out(query, key, value, mask)
            else:
                attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        result: Tensor = self.out(attended.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))
        return result

    def written_out(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Compute attention with products and a softmax, with softcap and sinks."""
        scores = query @ key.transpose(2, 3) * self.shape.head_dim**-0.5
        if self.shape.softcap is not None:
            scores = torch.tanh(scores / self.shape.softcap) * self.shape.softcap
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if self.shape.sinks:
            sinks = self.sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[-2], -1)
            scores = torch.cat([scores, sinks], dim=-1)
            scores = scores - scores.max(dim=-1, keepdim=True).values
        weights: Tensor = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        return (weights[..., :-1] if self.shape.sinks else weights).matmul(value)

    def flex(self, query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> Tensor:
        """Compute flex attention, with softcap."""
        from torch.nn.attention.flex_attention import flex_attention

        softcap = self.shape.softcap

        def capped(score: Tensor, *_: Tensor) -> Tensor:
            return score if softcap is None else torch.tanh(score / softcap) * softcap

        attended = flex_attention(query, key, value, capped, block_mask, enable_gqa=True)
        assert isinstance(attended, Tensor)
        return attended


def rotary_angles(position_ids: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, [tokens, dim]."""
    frequencies = 100.0 ** -(torch.arange(0, dim, 2, device=position_ids.device) / dim)
    angles = position_ids[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``cos.shape[-1]`` entries of each head, [1, heads, tokens, head_dim]."""
    dim = cos.shape[-1]
    turned, kept = x[..., :dim], x[..., dim:]
    first, second = turned[..., : dim // 2], turned[..., dim // 2 :]
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return turned if dim == x.shape[-1] else torch.cat([turned, kept], dim=-1)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of entries of each head."""
    half = x.shape[-1] // 2
    first, second = x.reshape(*x.shape[:-1], half, 2).unbind(-1)
    cos, sin = cos[..., :half], sin[..., :half]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


def rotate_complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute ``rotate_pairs`` with complex numbers."""
    half = x.shape[-1] // 2
    turns = torch.complex(cos[..., :half], sin[..., :half])
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], half, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


ROTATIONS = {"full": rotate, "partial": rotate, "interleaved": rotate_pairs, "complex": rotate_complex}


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """Repeat heads: [1, kv_heads, tokens, head_dim] -> [1, kv_heads * groups, tokens, head_dim]."""
    batch, heads, tokens, dim = x.shape
    return x[:, :, None].expand(batch, heads, groups, tokens, dim).reshape(batch, heads * groups, tokens, dim)


def causal_mask(tokens: int, device: torch.device, window: int | None = None) -> Tensor:
    """Return a bool mask [1, 1, tokens, tokens]: True for keys up to the query and inside its window."""
    index = torch.arange(tokens, device=device)
    visible = index[None, :] <= index[:, None]
    if window is not None:
        visible = visible & (index[None, :] > index[:, None] - window)
    return visible[None, None]


def causal_blocks(tokens: int, device: torch.device, window: int | None = None) -> Any:
    """Return ``causal_mask`` as a block mask of flex attention."""
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        visible = query >= key
        return visible if window is None else visible & (query - key < window)

    return create_block_mask(causal, None, None, tokens, tokens, device)
