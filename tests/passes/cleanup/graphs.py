"""Small graphs of plain functions, for passes that need no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from vlcache_fx.passes import Program


def program_of(function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> Program:
    """Return a program with the ATen graph of ``function``, with fake values."""
    module = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs)
    assert isinstance(module, torch.fx.GraphModule)
    return Program(module)
