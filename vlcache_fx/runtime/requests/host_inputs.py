"""The inputs that keys are made of, brought to the CPU at once.

Token ids, positions and masks tell what a call is made of. Each look at one of them on a GPU waits until the
GPU has done all that it was asked for before; so they come together, and are looked at here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

MOST_BYTES = 1 << 22
"""A mask over pairs of tokens is larger, and stays where it is."""


def on_host(args: Sequence[Any], indices: Iterable[int]) -> list[Any]:
    """``args`` with those at ``indices`` on the CPU, where they are tensors of at most ``MOST_BYTES``.

    The device is waited for once, and not at all where nothing lies on one.
    """
    brought = list(args)
    streams = {}
    for index in indices:
        value = args[index]
        if not isinstance(value, Tensor) or value.device.type != "cuda" or value.nbytes > MOST_BYTES:
            continue
        brought[index] = torch.empty_like(value, device="cpu", pin_memory=True)
        brought[index].copy_(value.detach(), non_blocking=True)
        streams[value.device] = torch.cuda.current_stream(value.device)
    for stream in streams.values():
        stream.synchronize()
    return brought
