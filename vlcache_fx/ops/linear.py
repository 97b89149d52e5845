"""``torch.ops.vlcache.linear``: a bfloat16 linear layer on the CPU, fast for few rows.

With one or two rows, as in decoding or a repeated prompt, a layer takes as long as reading its weights;
PyTorch reads them at about half the memory bandwidth. With some dozens, as for a question after a known
prompt, PyTorch takes about as long to pack the weights as to multiply them.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from vlcache_fx.ops.native import define_operator, native_kernel

__all__ = ["FEW_ROWS", "MAX_ROWS", "decompose_linear", "linear"]

FEW_ROWS, MAX_ROWS = 6, 80
"""``FEW`` and ``MAX_ROWS`` of ``linear.cpp``. With more rows, PyTorch is as fast."""

_TYPES = (*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3)


def _kernel() -> Callable[..., None] | None:
    return native_kernel("linear", _TYPES)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``torch.nn.functional.linear``.
    Args:
        rows: bfloat16 [.., width], on the CPU.
        weight: bfloat16 [outputs, width].
        bias: bfloat16 [outputs], or None.

    Returns:
        [.., outputs], dense.
    """
    width, outputs = rows.shape[-1], weight.shape[0]
    count = rows.numel() // max(width, 1)
    kernel = _kernel() if _is_faster(count, width) else None
    if kernel is None:
        return F.linear(rows, weight, bias).contiguous()
    rows, weight = rows.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = rows.new_empty((*rows.shape[:-1], outputs))
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (rows, weight, bias, out))
    kernel(*pointers, count, width, outputs)
    return out


def _is_faster(count: int, width: int) -> bool:
    """Return whether the kernel is faster than PyTorch, which uses AMX for more than a few rows."""
    if count <= FEW_ROWS:
        return count > 0
    return count <= MAX_ROWS and width % 2 == 0 and not torch.cpu._is_amx_tile_supported()


def _fake(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001 (the schema)
    return rows.new_empty((*rows.shape[:-1], weight.shape[0]))


define_operator(linear, _fake)


def decompose_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Return ``vlcache.linear`` for ``aten.linear``, or NotImplemented."""
    operands = [tensor for tensor in (rows, weight, bias) if tensor is not None]
    is_supported = (
        all(tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 for tensor in operands)
        and weight.dim() == 2
        and weight.is_contiguous()
        and not any(tensor.requires_grad for tensor in operands)
        and not statically_known_true(rows.numel() > MAX_ROWS * rows.shape[-1])
        and _kernel() is not None
    )
    return torch.ops.vlcache.linear(rows, weight, bias) if is_supported else NotImplemented
