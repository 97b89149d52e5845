"""``torch.ops.vlcache.attention``: bfloat16 attention on the CPU.

On processors with AVX-512 BF16 but without AMX, PyTorch's CPU kernel multiplies bfloat16 matrices as float32.
This kernel uses oneDNN for both products, at the same accuracy: scores, softmax and sums are in float32.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vlcache_fx.ops.native import define_operator, int64_array, native_kernel

__all__ = ["FastAttention", "attention", "decompose_attention", "row_mask"]

LANES = 16
"""float32 values per vector register; the head dimension must be a multiple."""

_TYPES = (*[ctypes.c_void_p] * 7, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float)


def _kernel() -> Callable[..., None] | None:
    return native_kernel("attention", _TYPES)


def _mkldnn_enabled() -> bool:
    return bool(torch._C._get_mkldnn_enabled())


@torch.library.custom_op("vlcache::row_mask", mutates_args=())
def row_mask(places: Tensor, tokens: int) -> Tensor:
    """Return ``arange(tokens) <= places``: the tokens that each row reads.

    An operator, because Inductor's CPU code for this comparison is ten times slower than PyTorch's.

    Args:
        places: last token position that each row reads, integers or floats [.., rows, 1].
        tokens: number of tokens.

    Returns:
        bool [.., rows, tokens].
    """
    return torch.arange(tokens, device=places.device) <= places


@row_mask.register_fake
def _(places: Tensor, tokens: int) -> Tensor:
    sizes = torch.broadcast_shapes((tokens,), places.shape)  # type: ignore[no-untyped-call]
    return places.new_empty(sizes, dtype=torch.bool)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    places: Tensor | None = None,
) -> Tensor:
    """Compute scaled-dot-product attention with grouped key heads.

    Args:
        query: bfloat16 [batch, heads, rows, dim], on the CPU.
        key: bfloat16 [batch, key heads, tokens, dim]; heads are a multiple of key heads.
        value: shape and dtype of ``key``.
        mask: bool, broadcastable to [batch, heads, rows, tokens]: True where a row reads a token; or None.
        is_causal: row i reads tokens 0 to i.
        scale: factor of the scores.
        places: int64, broadcastable to [batch, 1, rows, 1]: last token position that each row reads; or
            None. Excludes ``is_causal``.

    Returns:
        [batch, heads, rows, dim], dense as [batch, rows, heads, dim]; zeros for a row that reads no token.
    """
    kernel = _kernel() if _mkldnn_enabled() else None
    if kernel is None:  # oneDNN was disabled after compilation
        if places is not None:
            allowed = row_mask(places, key.shape[2])
            mask = allowed if mask is None else mask & allowed
        result = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=True
        )
        return result.transpose(1, 2).contiguous().transpose(1, 2)
    batch, heads, rows, dim = query.shape
    key_heads, tokens = key.shape[1:3]
    out = query.new_empty((batch, rows, heads, dim))
    query, key, value = _dense(query), _dense(key), _dense(value)
    strides = [*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]]
    if mask is not None:
        mask = mask.expand(batch, heads, rows, tokens)
        mask = mask if mask.stride(-1) == 1 or tokens == 1 else mask.contiguous()
        strides += mask.stride()[:3]
    if places is not None:
        places = places.expand(batch, 1, rows, 1).contiguous()
    kernel(
        *(None if tensor is None else tensor.data_ptr() for tensor in (query, key, value, mask, out)),
        int64_array(batch, heads, key_heads, rows, tokens, dim),
        int64_array(*strides),
        int(is_causal),
        None if places is None else places.data_ptr(),
        scale,
    )
    return out.transpose(1, 2)


def _fake(
    query: Tensor,
    key: Tensor,  # noqa: ARG001 (the schema)
    value: Tensor,  # noqa: ARG001
    mask: Tensor | None,  # noqa: ARG001
    is_causal: bool,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    places: Tensor | None = None,  # noqa: ARG001
) -> Tensor:
    batch, heads, rows, dim = query.shape
    return query.new_empty((batch, rows, heads, dim)).transpose(1, 2)


define_operator(attention, _fake)


def decompose_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    places: Tensor | None = None,
) -> Any:
    """Return ``vlcache.attention`` for ``aten.scaled_dot_product_attention``, or NotImplemented.

    See ``attention`` for ``places``.
    """
    operands = (query, key, value)
    is_supported = (
        all(x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.dim() == 4 for x in operands)
        and (attn_mask is None or (attn_mask.dtype == torch.bool and attn_mask.dim() <= 4))
        and dropout_p == 0.0
        and (places is None or _is_one_per_row(places))
        and (enable_gqa or query.shape[1] == key.shape[1])
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % LANES == 0
        and not any(x.requires_grad for x in operands)
        and _mkldnn_enabled()
        and _kernel() is not None
    )
    if not is_supported:
        return NotImplemented
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.vlcache.attention(query, key, value, attn_mask, is_causal, scale, places)


class FastAttention(TorchFunctionMode):
    """Replaces ``scaled_dot_product_attention`` by ``vlcache.attention`` where supported."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See ``TorchFunctionMode``."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            result = decompose_attention(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


def _is_one_per_row(places: Tensor) -> bool:
    """Return whether the shape is [rows, 1] or [batch, 1, rows, 1], which the kernel supports."""
    if places.dtype != torch.int64 or places.dim() not in (2, 4):
        return False
    return all(isinstance(size, int) and size == 1 for size in (places.shape[1], places.shape[-1]))


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
