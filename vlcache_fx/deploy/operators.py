"""Operators of programs, decomposed for all ONNX importers: no NonZero, no masked scatter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlcache_fx.ops import (
    attend_reference,
    scatter_rows_reference,
    splice_rows_reference,
    take_rows_reference,
)

aten = torch.ops.aten

ATTENTION_OPSET = 23
"""The first opset with an operator for attention."""


def merge(embeddings: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """Compute ``embeddings.masked_scatter(mask, features)`` for masks over whole tokens.

    Args:
        embeddings: [1, tokens, width].
        mask: bool, broadcastable to ``embeddings``; equal for all values of a token.
        features: one row of ``width`` values per token of the mask.
    """
    flags = mask[..., 0].expand(embeddings.shape[:-1])
    index = (flags.cumsum(-1) - 1).clamp(min=0)
    rows = features.reshape(-1, embeddings.shape[-1])
    return torch.where(flags.unsqueeze(-1), rows[index], embeddings)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001 (0.0 in programs)
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute ``aten.scaled_dot_product_attention`` with products and a softmax, without repeating key heads.

    Shapes as in ``vlcache_fx.ops.attend``. Every row must attend to at least one token.
    """
    batch, heads, rows, dim = query.shape
    tokens = key.shape[-2]
    groups = heads // key.shape[1] if enable_gqa else 1
    if is_causal:
        keys = torch.arange(tokens, device=query.device)
        mask = (keys <= torch.arange(rows, device=query.device).unsqueeze(1)).expand(1, 1, rows, tokens)
    query = query * (dim**-0.5 if scale is None else scale)
    if groups > 1:
        query = query.reshape(batch, key.shape[1], groups * rows, dim)
    scores = (query @ key.transpose(-2, -1)).reshape(batch, heads, rows, tokens)
    if mask is not None and mask.dtype == torch.bool:
        scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    probabilities = torch.softmax(scores, -1)
    if groups > 1:
        probabilities = probabilities.reshape(batch, key.shape[1], groups * rows, tokens)
    return (probabilities @ value).reshape(batch, heads, rows, value.shape[-1])


def attention_node(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001 (0.0 in programs)
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001 (ONNX infers it from the number of heads)
) -> Tensor:
    """Compute ``aten.scaled_dot_product_attention`` with ONNX's ``Attention`` node."""
    result: Tensor = torch.onnx.ops.attention(query, key, value, mask, is_causal=is_causal, scale=scale)[0]
    return result


def plain_operators(opset: int) -> Mapping[Any, Callable[..., Any]]:
    """Return replacements for operators that ONNX importers lack."""
    plain: dict[Any, Callable[..., Any]] = {
        aten.masked_scatter.default: merge,
        aten.view.default: aten.reshape.default,  # replaced operators may return other strides
        torch.ops.vlcache.attend.default: attend_reference,
        torch.ops.vlcache.splice_rows.default: splice_rows_reference,
        torch.ops.vlcache.scatter_rows.default: scatter_rows_reference,
        torch.ops.vlcache.take_rows.default: take_rows_reference,
    }
    plain[aten.scaled_dot_product_attention.default] = (
        attention if opset < ATTENTION_OPSET else attention_node
    )
    return plain
