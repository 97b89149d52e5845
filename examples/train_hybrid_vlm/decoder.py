"""The decoder's forward pass for training: the model's weights and norms, without its caches and masks.

Rows begin at their first token and are padded at the end, so causal order is all the mask there is.
Nothing here waits for a GPU, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.train_hybrid_vlm.convolution import CausalConvolution
from examples.train_hybrid_vlm.delta_rule import delta_rule

Batch = dict[str, Tensor]
GUIDED_HEAD = 0


@dataclass(frozen=True)
class Losses:
    """Losses of a batch, and ``right [rows, questions]``: whether the answer is the likeliest word."""

    answers: Tensor
    guide: Tensor
    right: Tensor


def products_in(precision: torch.dtype, device: torch.device) -> torch.autocast:
    """Multiply in ``precision``; no copies of weights are kept, since CUDA graphs could not renew them."""
    narrow = precision is not torch.float32
    return torch.autocast(
        device.type, precision if narrow else torch.bfloat16, enabled=narrow, cache_enabled=False
    )


def losses(model: Any, batch: Batch, features: Tensor, precision: torch.dtype) -> Losses:
    """Losses of one batch of conversations.

    Args:
        model: a ``Qwen3_5ForConditionalGeneration``.
        batch: what ``conversations.make_batch`` returns, as tensors on the model's device.
        features: vision tokens [rows, most tokens, hidden].
        precision: of products; the delta rule and norms compute in float32.
    """
    text = model.model.language_model
    asking = batch["asking"].long()
    cos, sin = text.rotary_emb(features, batch["position_ids"].long())
    with products_in(precision, features.device):
        x = _embed(text.embed_tokens.weight, batch["input_ids"], batch["vision_index"].long(), features)
        guide = None
        for layer in text.layers:
            normed = layer.input_layernorm(x)
            if hasattr(layer, "linear_attn"):
                x = x + recurrent_rows(layer.linear_attn, normed)
            else:
                rows, query, key = attention_rows(layer.self_attn, normed, cos, sin)
                if guide is None:
                    guide = _guide_loss(layer.self_attn.scaling, query, key, batch)
                x = x + rows
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        places = torch.stack([asking, asking + 1], -1).flatten(1)
        x = x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
        logits = model.lm_head(text.norm(x)).float()
    labels = batch["labels"].long()
    right = logits[:, ::2].argmax(-1) == labels[:, ::2]
    answers = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    if guide is None:
        raise ValueError("the decoder has no attention layer to guide")
    return Losses(answers, guide, right.detach())


def _embed(weight: Tensor, ids: Tensor, vision_index: Tensor, features: Tensor) -> Tensor:
    """Embeddings of words, and vision tokens where ``vision_index`` is not negative.

    A product with one-hot rows: an embedding's backward pass would sort all ids.
    """
    with torch.autocast(weight.device.type, enabled=False):
        words = (ids[..., None] == torch.arange(len(weight), device=weight.device)).float() @ weight
    vision = features.gather(1, vision_index.clamp(min=0)[..., None].expand(-1, -1, features.shape[-1]))
    return torch.where(vision_index[..., None] >= 0, vision, words)


def recurrent_rows(layer: Any, x: Tensor) -> Tensor:
    """What a ``Qwen3_5GatedDeltaNet`` returns for rows without a cache; equal numbers of heads."""
    mixed = layer.in_proj_qkv(x).float()
    mixed = CausalConvolution.apply(mixed, layer.conv1d.weight[:, 0])  # type: ignore[no-untyped-call]
    sizes = [layer.key_dim, layer.key_dim, layer.value_dim]
    query, key, value = torch.split(F.silu(mixed), sizes, -1)
    decay = -layer.A_log.float().exp() * F.softplus(layer.in_proj_a(x).float() + layer.dt_bias)
    beta = layer.in_proj_b(x).float().sigmoid()
    with torch.autocast(x.device.type, enabled=False):
        rows = delta_rule(
            query.reshape(*x.shape[:2], -1, layer.head_k_dim),
            key.reshape(*x.shape[:2], -1, layer.head_k_dim),
            value.reshape(*x.shape[:2], -1, layer.head_v_dim),
            decay,
            beta,
        )
    gate = layer.in_proj_z(x).unflatten(-1, (-1, layer.head_v_dim))
    result: Tensor = layer.out_proj(layer.norm(rows, gate).flatten(-2))
    return result


def attention_rows(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a ``Qwen3_5Attention`` returns for rows without a cache; query and key of the guided head."""
    query, gate = layer.q_proj(x).unflatten(-1, (-1, 2 * layer.head_dim)).chunk(2, -1)
    query = layer.q_norm(query).transpose(1, 2)
    key = layer.k_norm(layer.k_proj(x).unflatten(-1, (-1, layer.head_dim))).transpose(1, 2)
    value = layer.v_proj(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
    query, key = (_rotate(part.float(), cos, sin) for part in (query, key))
    group = layer.num_key_value_groups
    wide_key, wide_value = (
        part.to(value.dtype)[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for part in (key, value)
    )
    rows = F.scaled_dot_product_attention(
        query.to(value.dtype), wide_key, wide_value, is_causal=True, scale=layer.scaling
    ).transpose(1, 2)
    result = layer.o_proj(rows.flatten(-2) * gate.flatten(-2).sigmoid())
    return result, query[:, GUIDED_HEAD], key[:, GUIDED_HEAD // group]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of ``x [batch, heads, tokens, d]``."""
    cos, sin = cos[:, None].float(), sin[:, None].float()
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    left, right = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-right, left], -1) * sin, rest], -1)


def _guide_loss(scaling: float, query: Tensor, key: Tensor, batch: Batch) -> Tensor:
    """Divergence of a head's weights from the answer's cells, over the questions that have some."""
    asking, cells, weights = batch["asking"].long(), batch["cells"].long(), batch["cell_weights"].float()
    with torch.autocast(query.device.type, enabled=False):
        query = query.gather(1, asking[..., None].expand(-1, -1, query.shape[-1]))
        scores = query @ key.mT * scaling
        unseen = torch.arange(key.shape[1], device=key.device) > asking[..., None]
        found = scores.masked_fill(unseen, float("-inf")).log_softmax(-1).gather(-1, cells)
        total = weights.sum(-1, keepdim=True)
        wanted = weights / total.clamp(min=1e-6)
        loss = (wanted * (wanted.clamp(min=1e-6).log() - found)).sum(-1)
        guided: Tensor = loss.sum() / (total > 0).sum().clamp(min=1)
    return guided


def initialise_recurrent(model: Any) -> None:
    """Start recurrent layers with memories of 3 to 300 tokens, and convolutions near the identity.

    The stock decay forgets everything after a token, and stock convolutions return next to nothing. Norms of
    queries and keys start larger, so that a head can look at one token of many.
    """
    for layer in model.model.language_model.layers:
        if not hasattr(layer, "linear_attn"):
            layer.self_attn.q_norm.weight.data.fill_(1.0)
            layer.self_attn.k_norm.weight.data.fill_(0.5)
            continue
        mixer = layer.linear_attn
        heads = torch.arange(mixer.num_v_heads) / max(1, mixer.num_v_heads - 1)
        per_token = 0.003 * (0.3 / 0.003) ** heads
        mixer.A_log.data.zero_()
        mixer.dt_bias.data.copy_(torch.log(torch.expm1(per_token)))
        mixer.in_proj_a.weight.data.mul_(0.3)
        mixer.out_proj.weight.data.mul_(0.25)
        torch.nn.init.normal_(mixer.conv1d.weight, std=0.2)
        mixer.conv1d.weight.data[:, :, -1] += 1.0
