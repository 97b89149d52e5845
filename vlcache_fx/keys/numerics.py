"""Global state of torch that changes numbers: part of every key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def numerics(device_type: str) -> str:
    """Autocast, default dtype and the precision of matrix products, as they are now in this thread.

    The text is the same for a CPU and a GPU where nothing lowers the precision of either. By default, a GPU
    convolves float32 as TF32, so it differs; ``torch.backends.cudnn.allow_tf32 = False`` makes it equal.

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
    lowered = [setting for device in devices for setting in _lowered(device)]
    matmul = torch.backends.cuda.matmul
    sums = (
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
    )
    return repr((autocast, str(torch.get_default_dtype()), lowered, sums))


def _lowered(device_type: str) -> list[tuple[str, str, str]]:
    """Return what computes float32 with fewer bits on a device: (device, operators, precision)."""
    # The current settings. Reading torch's older ones, such as ``allow_tf32``, fails once these are set.
    backends: Any = torch.backends
    operators = {
        "cpu": (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn),
        "cuda": (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn),
    }.get(device_type, ())
    return [
        (device_type, name, operator.fp32_precision)
        for name, operator in zip(("matmul", "conv", "rnn"), operators, strict=False)
        if operator.fp32_precision not in ("none", "ieee")
    ]


def device_type_of(values: Iterable[Any]) -> str:
    """Where a computation on these values runs: the device of a tensor that is not on the CPU, if any."""
    types = (value.device.type for value in values if isinstance(value, Tensor))
    return next((kind for kind in types if kind != "cpu"), "cpu")
