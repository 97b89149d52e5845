"""What ``torch.compile`` can do for long prompts of hybrid decoders: all but the recurrent modules.

Models of transformers write recurrences as loops over chunks of tokens. ``torch.compile`` unrolls them: 65
chunks a layer for 4,096 vision tokens, anew for every number of chunks, which takes many minutes to compile.
Users leave such modules to eager execution, with ``torch.compiler.disable``.
"""

import inspect
import types
from typing import Any

import torch
from torch import nn

from vlcache_fx.bench.model import share_weights
from vlcache_fx.integrations.recurrences import KERNELS

__all__ = ["recurrent_modules", "with_eager_recurrences"]


def recurrent_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that call a recurrence by its name."""
    return [module for module in model.modules() if _calls_recurrence(type(module))]


def with_eager_recurrences(model: nn.Module) -> Any:
    """Return a copy that shares the weights, and whose recurrent modules ``torch.compile`` leaves alone."""
    copied = share_weights(model)
    for module in recurrent_modules(copied):
        disabled: Any = torch.compiler.disable(module.forward)  # type: ignore[no-untyped-call]
        module.forward = disabled
    return copied


def _calls_recurrence(cls: type[nn.Module]) -> bool:
    function = inspect.unwrap(cls.forward)
    if not isinstance(function, types.FunctionType):
        return False
    return any(name.endswith(tuple(KERNELS)) for name in function.__code__.co_names)
