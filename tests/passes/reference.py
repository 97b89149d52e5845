"""Partial recompute of a ``TinyVlm`` in plain torch, without any graph rewrite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlcache_fx.testing.prompts import IMAGE_TOKEN
from vlcache_fx.testing.tiny_attention import ROTATIONS, repeat_heads, rotary_angles
from vlcache_fx.testing.tiny_vlm import TinyVlm

KeyValue = tuple[Tensor, Tensor]


def forward(
    model: TinyVlm,
    inputs: dict[str, Tensor],
    rows: Sequence[Tensor],
    stored: Sequence[KeyValue] | None = None,
) -> tuple[Tensor, list[KeyValue]]:
    """Return the logits of the last row set, and the keys and values of each layer before positions enter.

    Args:
        model: the model.
        inputs: the prompt.
        rows: L + 1 sets of token positions; layer i computes keys and values of ``rows[i]``, and everything
            else of ``rows[i + 1]``.
        stored: per layer, keys and values of all tokens, [1, kv_heads, tokens, head_dim]; those of computed
            rows are not read.
    """
    ids = inputs["input_ids"]
    num_tokens, shape = ids.shape[1], model.decoder.shape
    embeds = model.embed(ids)
    embeds[ids == IMAGE_TOKEN] = model.encoder(inputs["pixel_values"])
    rotary = rotary_angles(torch.arange(num_tokens), shape.rotary_dim)
    x = embeds[:, rows[0]] * (shape.hidden**0.5 if shape.embed_scale else 1)
    kept = []
    for index, layer in enumerate(model.decoder.layers):
        entering = x if shape.norm_place != "pre" and not shape.parallel else layer.norm_1(x)
        query, key, value = layer.attention.project(entering)
        here, after = rows[index], rows[index + 1]
        if stored is not None:
            full_key, full_value = stored[index][0].clone(), stored[index][1].clone()
            full_key[:, :, here], full_value[:, :, here] = key, value
            key, value = full_key, full_value
        kept.append((key, value))
        kept_rows = torch.searchsorted(here, after)
        x, entering, query = x[:, kept_rows], entering[:, kept_rows], query[:, :, kept_rows]
        if shape.rotary_dim:
            (cos, sin), turn = rotary, ROTATIONS[shape.rope]
            query, key = turn(query, cos[after], sin[after]), turn(key, cos, sin)
        groups = shape.heads // shape.kv_heads
        scores = query @ repeat_heads(key, groups).transpose(2, 3) / shape.head_dim**0.5
        if shape.softcap is not None:
            scores = (scores / shape.softcap).tanh() * shape.softcap
        distance = after[:, None] - torch.arange(num_tokens)  # [rows, keys]
        window = shape.window_of(index)
        hidden = (distance < 0) | (distance >= (num_tokens if window is None else window))
        scores = scores.masked_fill(hidden, float("-inf"))
        most = scores.amax(-1, keepdim=True)  # subtracted, because exp() of large scores is infinite
        weights = (scores - most).exp()
        total = weights.sum(-1, keepdim=True)
        if shape.sinks:
            total = total + (layer.attention.sinks[:, None, None] - most).exp()
        attended = (weights / total @ repeat_heads(value, groups)).transpose(1, 2).flatten(2)
        out = layer.attention.out(attended)
        if shape.parallel:
            x = x + out + layer.mlp(entering)
        elif shape.norm_place == "pre":
            x = x + out
            x = x + layer.mlp(layer.norm_2(x))
        elif shape.norm_place == "branch":
            x = x + layer.norm_1(out)
            x = x + layer.norm_2(layer.mlp(x))
        else:
            x = layer.norm_1(x + out)
            x = layer.norm_2(x + layer.mlp(x))
    return model.decoder.head(model.decoder.norm(x)), kept
