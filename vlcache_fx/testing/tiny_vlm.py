"""A tiny vision-language model in plain torch, and prompts for it.

A ``DecoderShape`` selects attention, norms and positions, for tests of specific structures. Weights are
random, reproducible by seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlcache_fx.testing.prompts import IMAGE_TOKEN, VOCABULARY, make_prompt, noise, seeded
from vlcache_fx.testing.tiny_attention import (
    Attention,
    DecoderShape,
    causal_blocks,
    causal_mask,
    rotary_angles,
)


class Mlp(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.hidden, 2 * shape.hidden, bias=shape.bias)
        self.down = nn.Linear(2 * shape.hidden, shape.hidden, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[1, tokens, hidden] -> [1, tokens, hidden]."""
        result: Tensor = self.down(F.silu(self.up(x)))
        return result


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.attention, self.mlp = Attention(shape), Mlp(shape)
        self.norm_1, self.norm_2 = _norm(shape), _norm(shape)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Any) -> Tensor:
        """Compute the residual stream after this layer."""
        attention, mlp, place = self.attention, self.mlp, self.shape.norm_place
        if self.shape.parallel:
            normed = self.norm_1(x)
            x = x + attention(normed, rotary, mask) + mlp(normed)
        elif place == "pre":
            x = x + attention(self.norm_1(x), rotary, mask)
            x = x + mlp(self.norm_2(x))
        elif place == "branch":
            x = x + self.norm_1(attention(x, rotary, mask))
            x = x + self.norm_2(mlp(x))
        else:
            x = self.norm_1(x + attention(x, rotary, mask))
            x = self.norm_2(x + mlp(x))
        return x


class TinyDecoder(nn.Module):
    """Token embeddings -> logits."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = _norm(shape)
        self.head = nn.Linear(shape.hidden, VOCABULARY, bias=False)
        if shape.learned_positions:
            self.positions = nn.Embedding(512, shape.hidden)

    def forward(self, embeds: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Compute logits of the last token or of all tokens, [1, 1 or tokens, vocabulary]."""
        shape = self.shape
        if position_ids is None:
            position_ids = torch.arange(embeds.shape[1], device=embeds.device)
        x = embeds + self.positions(position_ids) if shape.learned_positions else embeds
        if shape.embed_scale:
            x = x * shape.hidden**0.5
        rotary = rotary_angles(position_ids, shape.rotary_dim) if shape.rotary_dim else None
        windows = [shape.window_of(index) for index in range(shape.num_layers)]
        masks = {window: self.mask(embeds, window) for window in dict.fromkeys(windows)}
        for layer, window in zip(self.layers, windows, strict=True):
            x = layer(x, rotary, masks[window])
        if shape.last_only:
            x = x[:, -1:]
        logits: Tensor = self.head(self.norm(x))
        return logits

    def mask(self, embeds: Tensor, window: int | None) -> Any:
        """Return the mask of layers with this window; None for ``is_causal``."""
        shape, tokens = self.shape, embeds.shape[1]
        if shape.attention == "flex":
            return causal_blocks(tokens, embeds.device, window)
        if shape.explicit_mask or shape.attention == "math" or window is not None:
            return causal_mask(tokens, embeds.device, window)
        return None


class TinyVlm(nn.Module):
    """A linear encoder of patches, a merge into token embeddings, and a ``TinyDecoder``."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(PATCH_WIDTH, shape.hidden), nn.GELU(), nn.Linear(shape.hidden, shape.hidden)
        )
        self.embed = nn.Embedding(VOCABULARY, shape.hidden)
        self.decoder = TinyDecoder(shape)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Compute logits; pass ``pixel_values`` [patches, width], the encoder's ``features``, or neither."""
        embeds = self.embed(input_ids)
        if pixel_values is not None:
            features = self.encoder(pixel_values)
        if features is not None:
            mask = (input_ids == IMAGE_TOKEN)[..., None].expand_as(embeds)
            embeds = embeds.masked_scatter(mask, features)
        logits: Tensor = self.decoder(embeds, position_ids)
        return logits


PATCH_WIDTH = 6


def tiny_vlm(
    shape: DecoderShape | None = None, seed: int = 0, cls: type[TinyVlm] = TinyVlm, **options: Any
) -> TinyVlm:
    """Create a ``TinyVlm`` in eval mode.

    Args:
        shape: shape of its decoder.
        seed: seed of the weights.
        cls: a subclass with another ``forward``.
        options: fields of ``DecoderShape``, without ``shape``, and attributes of ``cls``.
    """
    attributes = {name: options.pop(name) for name in tuple(options) if name in vars(cls)}
    with seeded(seed):
        model = cls(DecoderShape(**options) if shape is None else shape)
        for name, value in attributes.items():
            setattr(model, name, value)
        for module in model.modules():  # weights of ones would hide a lost weight
            if isinstance(module, nn.LayerNorm | nn.RMSNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
        return model.eval()


def tiny_vlm_inputs(
    before: int, after: int, images: Sequence[tuple[int, int]], text_seed: int = 0, between: int = 2
) -> dict[str, Tensor]:
    """Create a prompt for ``tiny_vlm``; an image is a media span with one token per patch.

    Args:
        before: text tokens before the first image (its media span starts there).
        after: text tokens after the last image.
        images: ``(number of tokens, image seed)`` of each.
        text_seed: seed of the text tokens.
        between: text tokens between two images.

    Returns:
        input_ids, and with images pixel_values.
    """
    inputs = make_prompt(before, after, between, [[IMAGE_TOKEN] * tokens for tokens, _ in images], text_seed)
    del inputs["attention_mask"]
    if images:
        inputs["pixel_values"] = torch.cat([noise(seed, tokens, PATCH_WIDTH) for tokens, seed in images])
    return inputs


def _norm(shape: DecoderShape) -> nn.Module:
    return nn.RMSNorm(shape.hidden, 1e-6) if shape.norm == "rms" else nn.LayerNorm(shape.hidden)
