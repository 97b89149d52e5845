"""``torch.ops.vlcache.attend``: attention that ``aten.scaled_dot_product_attention`` cannot express.

Scores may be capped (``softcap * tanh(scores / softcap)``), and each head may have a *sink*: a logit in the
softmax without a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlcache_fx.ops.attention import decompose_attention

__all__ = ["attend", "attend_reference", "decompose_attend"]


def attend_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Compute attention in the order of models' own code: product, scale, cap, mask, sinks, softmax.

    Scores have the dtype of ``query``, the softmax is in float32 (or float64), and probabilities have the
    dtype of ``value``. Key heads are not repeated: the query heads of a group share one matrix product.

    Args:
        query: [batch, heads, rows, dim].
        key: [batch, key heads, tokens, dim]; heads are a multiple of key heads.
        value: [batch, key heads, tokens, value dim].
        mask: broadcastable to [batch, heads, rows, tokens]: bool, True where a row reads a token, or
            floating, added to the scores; or None.
        sinks: [heads], on the scale of masked scores; or None.
        is_causal: row i reads tokens 0 to i; excludes ``mask``.
        scale: factor of the scores before the cap.
        softcap: bound of the scores' magnitude, or None.
        enable_gqa: True if there are fewer key heads than heads.

    Returns:
        [batch, heads, rows, value dim], contiguous; zeros for a row that reads no token and has no sink.
    """
    batch, heads, rows, dim = query.shape
    key_heads, tokens = key.shape[1:3]
    groups = heads // key_heads if enable_gqa else 1
    query = query if groups == 1 else query.reshape(batch, key_heads, groups * rows, dim)
    scores = (query @ key.transpose(-2, -1) * scale).view(batch, heads, rows, tokens)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if is_causal:
        tokens_before = torch.arange(tokens, device=query.device)
        mask = tokens_before <= torch.arange(rows, device=query.device)[:, None]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.reshape(1, heads, 1, 1).expand(batch, heads, rows, 1)
        scores = torch.cat([scores, column], -1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    probabilities = torch.ops.aten._safe_softmax(scores, -1, wide)
    if sinks is not None:
        probabilities = probabilities[..., :-1]
    probabilities = probabilities.to(value.dtype)
    if groups > 1:
        probabilities = probabilities.reshape(batch, key_heads, groups * rows, tokens)
    result: Tensor = (probabilities @ value).view(batch, heads, rows, value.shape[-1])
    return result


attend = torch.library.custom_op("vlcache::attend", attend_reference, mutates_args=())


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:  # noqa: ARG001 (the schema)
    return value.new_empty((*query.shape[:3], value.shape[-1]))


def decompose_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Express ``vlcache.attend`` in ``vlcache.attention`` if supported, otherwise in ATen."""
    if sinks is None and softcap is None:
        result = decompose_attention(
            query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        if isinstance(result, Tensor):
            return result
    return attend_reference(query, key, value, mask, sinks, is_causal, scale, softcap, enable_gqa)
