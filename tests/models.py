"""Tiny models with values that bypass the residual stream, and a model for padded batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlcache_fx.testing.prompts import IMAGE_TOKEN, PAD
from vlcache_fx.testing.tiny_attention import causal_mask, repeat_heads, rotary_angles, rotate
from vlcache_fx.testing.tiny_vlm import Layer, TinyVlm, tiny_vlm

LAYERS = 3
WIRINGS = ("side", "skip", "shared", "shared values", "residual values")
"""The supported kinds; ``tail`` and ``mixed keys`` are refused."""


class Wired(TinyVlm):
    """A ``TinyVlm`` whose layers read values of earlier layers outside the residual stream.

    Attributes:
        kind: ``side``: a function of the embeddings is added after every layer. ``skip``: the output of the
            first layer is added inside the last layer. ``shared``, ``shared values``: the last layer attends
            to keys and values (or only to values) of the first layer. ``residual values``: values of the
            first layer are added to those of later layers. ``tail``: the embeddings are added after the last
            layer. ``mixed keys``: the function of the embeddings is added to rotated keys.
    """

    kind = "plain"

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        embeds = self.embed(input_ids)
        image = (input_ids == IMAGE_TOKEN)[..., None].expand_as(embeds)
        x = embeds.masked_scatter(image, self.encoder(pixel_values))
        side, states, known = x.tanh(), [x], []
        for index, layer in enumerate(self.decoder.layers):
            last = index == LAYERS - 1
            query, key, value = self.operands(layer, x, side, known, last)
            x = x + self.attended(layer, query, key, value)
            known.append((key, value))
            if self.kind == "skip" and last:
                x = x + states[1]
            x = x + layer.mlp(layer.norm_2(x))
            if self.kind == "side":
                x = x + side
            states.append(x)
        if self.kind == "tail":
            x = x + states[0]
        x = x[:, -1:] if self.decoder.shape.last_only else x
        logits: Tensor = self.decoder.head(self.decoder.norm(x))
        return logits

    def operands(
        self, layer: Layer, x: Tensor, side: Tensor, known: list[tuple[Tensor, Tensor]], last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value of a layer; ``known`` are keys and values of the layers before."""
        query, key, value = layer.attention.project(layer.norm_1(x))
        rotary = rotary_angles(torch.arange(x.shape[1]), query.shape[-1])
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if self.kind == "mixed keys" and last:
            key = key + side[:, None, :, : key.shape[-1]]
        if self.kind == "residual values" and known:
            value = value + known[0][1]
        if self.kind == "shared" and last:
            key, value = known[0]
        if self.kind == "shared values" and last:
            value = known[0][1]
        return query, key, value

    def attended(self, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the attention's output, which is added to the residual."""
        samples, heads, tokens, _ = query.shape
        if self.decoder.shape.explicit_mask:
            key, value = repeat_heads(key, heads), repeat_heads(value, heads)
            mask = causal_mask(tokens, query.device)
            y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        added: Tensor = layer.attention.out(y.transpose(1, 2).reshape(samples, tokens, -1))
        return added


def wired(kind: str, **options: Any) -> Any:
    """Return a ``Wired`` of three layers, with one key and value head."""
    return tiny_vlm(cls=Wired, kind=kind, num_layers=LAYERS, **options)


class Padded(TinyVlm):
    """A ``TinyVlm`` for prompts of several lengths in one batch.

    Attributes:
        counted: True if positions start at the prompt's first token, False if they start at its padding.
    """

    counted = False

    def forward(self, input_ids: Tensor, pixel_values: Tensor, kept: Tensor) -> Tensor:  # type: ignore[override]
        embeds = self.embed(input_ids)
        image = (input_ids == IMAGE_TOKEN)[..., None].expand_as(embeds)
        x = embeds.masked_scatter(image, self.encoder(pixel_values))
        positions, dim = torch.arange(x.shape[1]), self.decoder.shape.rotary_dim
        if self.counted:
            positions = (kept.long().cumsum(1) - 1).clamp(min=0)
            cos, sin = rotary_angles(positions.flatten(), dim)
            rotary = tuple(part.view(*positions.shape, dim)[:, None] for part in (cos, sin))
        else:
            rotary = rotary_angles(positions, dim)
        mask = causal_mask(x.shape[1], x.device) & kept[:, None, None, :]
        for layer in self.decoder.layers:
            x = layer(x, rotary, mask)
        x = x[:, -1:] if self.decoder.shape.last_only else x
        logits: Tensor = self.decoder.head(self.decoder.norm(x))
        return logits


def padded(*, counted: bool = False, **options: Any) -> Any:
    """Return a ``Padded`` with one key and value head; ``options`` as for ``tiny_vlm``."""
    return tiny_vlm(cls=Padded, counted=counted, **options)


def batch_of(*prompts: Mapping[str, Tensor], left: bool = True, tokens: int = 0) -> dict[str, Tensor]:
    """Return the inputs of a call of ``Padded`` with several prompts of ``tiny_vlm_inputs``.

    Args:
        prompts: a prompt per sample, with pixels if it has images.
        left: True for padding before the prompts, False for padding after them.
        tokens: common length; by default that of the longest prompt.
    """
    tokens = tokens or max(prompt["input_ids"].shape[1] for prompt in prompts)
    ids, kept = [], []
    for prompt in prompts:
        missing = tokens - prompt["input_ids"].shape[1]
        sides = (missing, 0) if left else (0, missing)
        ids.append(F.pad(prompt["input_ids"], sides, value=PAD))
        kept.append(F.pad(torch.ones_like(prompt["input_ids"], dtype=torch.bool), sides, value=False))
    pixels = [prompt["pixel_values"] for prompt in prompts if "pixel_values" in prompt]
    return {"input_ids": torch.cat(ids), "pixel_values": torch.cat(pixels), "kept": torch.cat(kept)}
