"""``torch.ops.vlcache.attention``: attention of bfloat16 rows on a CPU.

PyTorch's own kernel for CPUs multiplies bfloat16 matrices as float32 where the processor has AVX-512 BF16
without AMX. This one uses oneDNN for both products, at the same accuracy: scores, softmax and sums are in
float32.
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
"""Values of float32 in a vector register; the head dimension must be a multiple."""

_TYPES = (*[ctypes.c_void_p] * 7, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float)


def _kernel() -> Callable[..., None] | None:
    return native_kernel("attention", _TYPES)


def _mkldnn_enabled() -> bool:
    return bool(torch._C._get_mkldnn_enabled())


@torch.library.custom_op("vlcache::row_mask", mutates_args=())
def row_mask(places: Tensor, tokens: int) -> Tensor:
    """``arange(tokens) <= places``: which tokens come up to each row's place.

    An operator, because on CPUs Inductor's code for this comparison takes ten times as long as PyTorch's.

    Args:
        places: numbers, [.., rows, 1].
        tokens: how many there are.

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
    """Scaled-dot-product attention with grouped key heads.

    Args:
        query: bfloat16 [batch, heads, rows, dim], on the CPU.
        key: bfloat16 [batch, key heads, tokens, dim]; heads are a multiple of key heads.
        value: like ``key``.
        mask: bool, broadcastable to [batch, heads, rows, tokens]: True where a row reads a token; or None.
        is_causal: row i reads tokens 0 to i alone.
        scale: of the scores.
        places: int64, broadcastable to [batch, 1, rows, 1]: last token position that each row reads; or
            None. Excludes ``is_causal``.

    Returns:
        [batch, heads, rows, dim], dense as [batch, rows, heads, dim]; zeros for a row that reads nothing.
    """
    kernel = _kernel() if _mkldnn_enabled() else None
    if kernel is None:  # switched off since this was compiled
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
        *(None if one is None else one.data_ptr() for one in (query, key, value, mask, out)),
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
    """``aten.scaled_dot_product_attention`` as ``vlcache.attention``, or NotImplemented.

    With ``places``, rows read tokens up to these alone.
    """
    operands = (query, key, value)
    serves = (
        all(one.device.type == "cpu" and one.dtype == torch.bfloat16 and one.dim() == 4 for one in operands)
        and (attn_mask is None or (attn_mask.dtype == torch.bool and attn_mask.dim() <= 4))
        and dropout_p == 0.0
        and (places is None or _is_one_per_row(places))
        and (enable_gqa or query.shape[1] == key.shape[1])
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % LANES == 0
        and not any(one.requires_grad for one in operands)
        and _mkldnn_enabled()
        and _kernel() is not None
    )
    if not serves:
        return NotImplemented
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.vlcache.attention(query, key, value, attn_mask, is_causal, scale, places)


class FastAttention(TorchFunctionMode):
    """Within it, ``scaled_dot_product_attention`` is ``vlcache.attention`` where that serves."""

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
    """True for [rows, 1] and [batch, 1, rows, 1], as the kernel takes them."""
    if places.dtype != torch.int64 or places.dim() not in (2, 4):
        return False
    return all(isinstance(size, int) and size == 1 for size in (places.shape[1], places.shape[-1]))


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
