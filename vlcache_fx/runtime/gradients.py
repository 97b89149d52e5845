"""Detects calls that record gradients: reused rows carry none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from vlcache_fx.errors import Reason, UnsupportedGraphError

MAX_DEPTH = 6
"""Depth of the search in arguments: a cache of caches has tensors four levels deep."""

UNSEARCHED = (nn.Module, type, str, bytes, int, float, torch.dtype, torch.device)


def records_gradients(values: Iterable[Any], model: nn.Module | None = None) -> bool:
    """Return True if torch would record gradients of ``values`` or of the parameters of ``model``.

    Always True in forward mode (``torch.func.jvp``): stored rows have no tangents.

    Args:
        values: arguments of a call; tensors are found in lists, mappings and plain objects such as caches.
        model: the model of the call.
    """
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    if model is not None and any(parameter.requires_grad for parameter in model.parameters()):
        return True
    return any(tensor.requires_grad for value in values for tensor in _tensors(value, MAX_DEPTH))


def gradient_refusal() -> UnsupportedGraphError:
    """Return the refusal of a call that records gradients."""
    return UnsupportedGraphError(Reason.GRAD_REQUIRED, "gradients are recorded; run it under torch.no_grad()")


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if depth == 0 or value is None or isinstance(value, UNSEARCHED):
        return
    if isinstance(value, Mapping):
        parts: Iterable[Any] = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    else:
        parts = getattr(value, "__dict__", {}).values()
    for part in parts:
        yield from _tensors(part, depth - 1)
