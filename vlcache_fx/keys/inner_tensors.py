"""Inner tensors of composite tensors: the plain tensors with the bytes, and the structure around them.

A quantised, sharded or sparse tensor has no bytes of its own: its values follow from inner tensors, scales,
block sizes and layouts.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vlcache_fx.errors import UnreadableWeightsError
from vlcache_fx.keys.digest import Part

_PLAIN = frozenset({Tensor, nn.Parameter, nn.Buffer})
# Deeper than any known quantisation (a 4-bit weight: tensor, its state, the state of its scales).
_MAX_DEPTH = 8


@dataclass(frozen=True)
class Leaves:
    """Inner tensors of one or more tensors.

    Attributes:
        tensors: plain tensors, in order.
        structure: classes, scales, block sizes and layouts around them, as parts of a key. Empty if all given
            tensors are plain.
    """

    tensors: tuple[Tensor, ...]
    structure: tuple[Part, ...]


def leaves_of(tensors: Iterable[Tensor]) -> Leaves:
    """Return the plain tensors that these tensors consist of.

    Raises:
        UnreadableWeightsError: a tensor has no readable bytes (on the ``meta`` device, wrapped by ``vmap``),
            or contains an object that cannot be part of a key.
    """
    leaves: list[Tensor] = []
    structure: list[Part] = []
    for index, tensor in enumerate(tensors):
        if _is_plain(tensor):
            leaves.append(tensor)
        else:
            try:
                structure += [index, _flatten(tensor, leaves, 0)]
            except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
                text = " ".join(str(error).split())
                raise UnreadableWeightsError(f"a weight ({type(tensor).__name__}): {text}") from error
    return Leaves(tuple(leaves), tuple(structure))


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _flatten(tensor: Tensor, leaves: list[Tensor], depth: int) -> Part:
    """Append the tensor's inner tensors to ``leaves`` and return its structure."""
    if depth > _MAX_DEPTH:
        raise _unreadable(tensor, "is nested too deeply")
    kind = _name(type(tensor))
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise _unreadable(tensor, "is wrapped by a function transform")
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        structure: list[Part] = [kind, _outer(tensor), _state(context, leaves, depth + 1)]
        for name in names:
            structure += [name, _state(getattr(tensor, name), leaves, depth + 1)]
        return structure
    if _has_own_dispatch(type(tensor)):
        raise _unreadable(tensor, "does not define __tensor_flatten__")
    if tensor.is_meta:
        raise _unreadable(tensor, "is on the meta device")
    structure = [kind] if type(tensor) in _PLAIN else [kind, _state(vars(tensor), leaves, depth + 1)]
    plain = tensor.detach()
    if type(plain) is not Tensor:
        plain = plain.as_subclass(Tensor)
    if _is_plain(plain):
        leaves.append(plain)
        return structure
    return [*structure, _outer(plain), *_flatten_layout(plain, leaves)]


def _flatten_layout(tensor: Tensor, leaves: list[Tensor]) -> list[Part]:
    if tensor.is_quantized:
        leaves.append(_bytes(tensor))
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            return [str(tensor.qscheme()), tensor.q_scale(), tensor.q_zero_point(), list(tensor.stride())]
        leaves += [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
        return [str(tensor.qscheme()), tensor.q_per_channel_axis(), list(tensor.stride())]
    if tensor.layout is torch.sparse_coo:
        leaves += [tensor._indices(), tensor._values()]
        return [tensor.is_coalesced()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        leaves += [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
        return []
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        leaves += [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
        return []
    raise _unreadable(tensor, f"has the layout {tensor.layout}")


def _bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _state(value: Any, leaves: list[Tensor], depth: int) -> Part:
    """Return an attribute of a tensor as part of a key; append tensors in it to ``leaves``."""
    if depth > _MAX_DEPTH:
        raise UnreadableWeightsError(f"a {type(value).__name__} within a weight is nested too deeply")
    inner = depth + 1
    match value:
        case enum.Enum():  # before numbers: an IntEnum is an int
            return ("enum", _name(type(value)), value.name)
        case None | bool() | int() | float() | str() | bytes():
            return value
        case Tensor() if _is_plain(value):
            leaves.append(value)
            return "tensor"
        case Tensor():
            return _flatten(value, leaves, inner)
        case torch.device():
            return "device"  # the same bytes are the same weights everywhere
        case torch.dtype() | torch.layout() | torch.memory_format() | torch.qscheme():
            return (type(value).__name__, str(value))
        case torch.SymInt() | torch.SymFloat() | torch.SymBool():
            raise UnreadableWeightsError("a weight has a symbolic size")
        case Mapping():
            return [
                (_state(key, leaves, inner), _state(part, leaves, inner))
                for key, part in value.items()
                if key != "_vlcache_digests"
            ]
        case list() | tuple():
            return [_name(type(value)), *(_state(part, leaves, inner) for part in value)]
        case set() | frozenset():
            return ["set", *sorted(str(_state(part, [], inner)) for part in value)]
        case type() | types.FunctionType() | types.BuiltinFunctionType():
            return ("name", f"{value.__module__}.{value.__qualname__}")
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
        return [_name(type(value)), _state(fields, leaves, inner)]
    text = repr(value)
    if getattr(type(value), "__repr__", None) is not object.__repr__ and " at 0x" not in text:
        return (_name(type(value)), text)
    if hasattr(value, "__dict__"):
        return [_name(type(value)), _state(vars(value), leaves, inner)]
    raise UnreadableWeightsError(f"a {type(value).__name__} within a weight cannot be part of a key")


def _outer(tensor: Tensor) -> Part:
    # Without the device: the same bytes are the same weights everywhere.
    sizes = [*tensor.shape, *(tensor.stride() if tensor.layout is torch.strided else ())]
    if not all(isinstance(size, int) for size in sizes):
        return [str(tensor.dtype), tensor.dim()]  # ragged: leaves have the sizes
    return [str(tensor.dtype), *(int(size) for size in sizes)]


def _has_own_dispatch(kind: type[Tensor]) -> bool:
    """Return whether operators on the class bypass the tensor's own bytes."""
    return kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _unreadable(tensor: Tensor, why: str) -> UnreadableWeightsError:
    sizes: Sequence[Any] = () if tensor.is_nested else tensor.shape
    return UnreadableWeightsError(f"a weight ({type(tensor).__name__}, {list(sizes)}) {why}")
