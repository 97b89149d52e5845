"""Global state of torch that changes numbers: part of every key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def numerics(device_type: str) -> str:
    """Autocast, default dtype and the precision of matrix products, as they are now in this thread.

    Args:
        device_type: of the computation, such as ``cuda``.
    """
    # Autocast casts by the device of the operands, and a model on a GPU may compute some of it on the CPU.
    devices = dict.fromkeys(("cpu", device_type))
    autocast = [
        (device, str(torch.get_autocast_dtype(device)))
        for device in devices
        if torch.is_autocast_enabled(device)
    ]
    matmul = torch.backends.cuda.matmul
    reduced = (
        torch.get_float32_matmul_precision(),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cudnn.allow_tf32 if device_type == "cuda" else None,
    )
    return repr((autocast, str(torch.get_default_dtype()), reduced))


def device_type_of(values: Iterable[Any]) -> str:
    """Where a computation on these values runs: the device of a tensor that is not on the CPU, if any."""
    types = (value.device.type for value in values if isinstance(value, Tensor))
    return next((kind for kind in types if kind != "cpu"), "cpu")
