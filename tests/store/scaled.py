"""A quantised tensor as quantisation libraries define it: a wrapper subclass of two inner tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Scaled(Tensor):
    """int8 values, a scale per row and a zero point; operators see the dequantised values."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor, zero: int = 0) -> Scaled:
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)
        made.values_, made.scale, made.zero = values, scale, zero
        return made

    values_: Tensor
    scale: Tensor
    zero: int

    @classmethod
    def of(cls, weight: Tensor) -> Scaled:
        scale = weight.abs().amax(-1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def plain(self) -> Tensor:
        return (self.values_.to(self.scale.dtype) - self.zero) * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["values_", "scale"], {"zero": self.zero}

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Scaled:
        return cls(inner["values_"], inner["scale"], context["zero"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear and isinstance(args[1], Scaled):
            return func(args[0], args[1].plain(), *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].values_, args[0].scale, args[0].zero)
        plain = tree_map(lambda value: value.plain() if isinstance(value, Scaled) else value, (args, kwargs))
        return func(*plain[0], **(plain[1] or {}))


class DispatchAlone(Scaled):
    """Takes part in operators only, like distributed tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def quantise(module: torch.nn.Module, kind: type[Scaled] = Scaled) -> torch.nn.Module:
    """Replace every linear layer's weight by a ``Scaled``."""
    for one in module.modules():
        if isinstance(one, torch.nn.Linear):
            made = kind.of(one.weight.detach())
            one.weight = torch.nn.Parameter(made, requires_grad=False)
    return module
