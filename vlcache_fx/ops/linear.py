"""``torch.ops.vlcache.linear``: a linear layer of bfloat16 on a CPU that is quick for few rows.

For one or two rows, as where a prompt comes again or an answer is decoded, a layer takes as long as reading
its weights. PyTorch's products read them at about half of what the machine can. For some dozens, as where a
question follows a known prompt, PyTorch's takes about as long to pack the weights as to multiply them.
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
"""``FEW`` and ``MAX_ROWS`` of ``linear.cpp``. For more rows, PyTorch's products are as quick."""

_TYPES = (*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3)


def _kernel() -> Callable[..., None] | None:
    return native_kernel("linear", _TYPES)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear``.

    Args:
        rows: bfloat16 [.., width], on the CPU.
        weight: bfloat16 [outputs, width].
        bias: bfloat16 [outputs], or None.

    Returns:
        [.., outputs], dense.
    """
    width, outputs = rows.shape[-1], weight.shape[0]
    count = rows.numel() // max(width, 1)
    kernel = _kernel() if _is_quicker(count, width) else None
    if kernel is None:
        return F.linear(rows, weight, bias).contiguous()
    rows, weight = rows.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = rows.new_empty((*rows.shape[:-1], outputs))
    pointers = (None if one is None else one.data_ptr() for one in (rows, weight, bias, out))
    kernel(*pointers, count, width, outputs)
    return out


def _is_quicker(count: int, width: int) -> bool:
    """Whether the kernel serves this number of rows; from some rows on, PyTorch's has AMX, where there is."""
    if count <= FEW_ROWS:
        return count > 0
    return count <= MAX_ROWS and width % 2 == 0 and not torch.cpu._is_amx_tile_supported()


def _fake(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001 (the schema)
    return rows.new_empty((*rows.shape[:-1], weight.shape[0]))


define_operator(linear, _fake)


def decompose_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """``aten.linear`` as ``vlcache.linear``, or NotImplemented."""
    operands = [one for one in (rows, weight, bias) if one is not None]
    serves = (
        all(one.device.type == "cpu" and one.dtype == torch.bfloat16 for one in operands)
        and weight.dim() == 2
        and weight.is_contiguous()
        and not any(one.requires_grad for one in operands)
        and not statically_known_true(rows.numel() > MAX_ROWS * rows.shape[-1])
        and _kernel() is not None
    )
    return torch.ops.vlcache.linear(rows, weight, bias) if serves else NotImplemented
