"""Copies the inputs from which keys are computed to the CPU, all at once.

Keys are computed on the CPU from token ids, positions and masks. Each device-to-host copy synchronizes the
stream, so one synchronization serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

MAX_BYTES = 1 << 22
"""Larger inputs, such as masks over pairs of tokens, stay on the device."""


def on_host(args: Sequence[Any], indices: Iterable[int]) -> list[Any]:
    """Return ``args`` with the tensors at ``indices`` of at most ``MAX_BYTES`` on the CPU.

    Each stream is synchronized once; none where no such tensor is on a GPU.
    """
    copied = list(args)
    streams = {}
    for index in indices:
        value = args[index]
        if not isinstance(value, Tensor) or value.device.type != "cuda" or value.nbytes > MAX_BYTES:
            continue
        copied[index] = torch.empty_like(value, device="cpu", pin_memory=True)
        copied[index].copy_(value.detach(), non_blocking=True)
        streams[value.device] = torch.cuda.current_stream(value.device)
    for stream in streams.values():
        stream.synchronize()
    return copied
