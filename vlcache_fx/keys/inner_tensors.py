"""What a tensor is made of: the plain tensors that hold its bytes, and all else that its values depend on.

A quantised, sharded or sparse tensor has no bytes of its own: it holds other tensors and says how they make
up the whole.
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
# Deeper nesting than any quantisation has (a 4-bit weight: tensor, its state, the state of its scales).
_DEEPEST = 8


@dataclass(frozen=True)
class Leaves:
    """Of one or more tensors.

    Attributes:
        tensors: plain ones, in order.
        form: how they make up the whole: classes, scales, block sizes, layouts. Empty for plain tensors.
    """

    tensors: tuple[Tensor, ...]
    form: tuple[Part, ...]


def leaves_of(tensors: Iterable[Tensor]) -> Leaves:
    """What these tensors are made of.

    Raises:
        UnreadableWeightsError: one of them has no bytes that could be read, such as one on the ``meta``
            device or one that ``vmap`` wraps; or holds something that no key can be made of.
    """
    found: list[Tensor] = []
    form: list[Part] = []
    for index, tensor in enumerate(tensors):
        if _is_plain(tensor):
            found.append(tensor)
        else:
            try:
                form += [index, _take_apart(tensor, found, 0)]
            except (RuntimeError, TypeError, NotImplementedError, AttributeError) as error:
                text = " ".join(str(error).split())
                raise UnreadableWeightsError(f"a weight ({type(tensor).__name__}): {text}") from error
    return Leaves(tuple(found), tuple(form))


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _take_apart(tensor: Tensor, found: list[Tensor], depth: int) -> Part:
    """Appends the tensor's leaves to ``found``; what else there is to know of it."""
    if depth > _DEEPEST:
        raise _unreadable(tensor, "is nested too deep")
    kind = _name(type(tensor))
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise _unreadable(tensor, "is wrapped by a function transform")
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        own: list[Part] = [kind, _outer(tensor), _state(context, found, depth + 1)]
        for name in names:
            own += [name, _state(getattr(tensor, name), found, depth + 1)]
        return own
    if _has_own_dispatch(type(tensor)):
        raise _unreadable(tensor, "says not of which tensors it is made")
    if tensor.is_meta:
        raise _unreadable(tensor, "is on the meta device")
    own = [kind] if type(tensor) in _PLAIN else [kind, _state(vars(tensor), found, depth + 1)]
    plain = tensor.detach()
    if type(plain) is not Tensor:
        plain = plain.as_subclass(Tensor)
    if _is_plain(plain):
        found.append(plain)
        return own
    return [*own, _outer(plain), *_parts_of_layout(plain, found)]


def _parts_of_layout(tensor: Tensor, found: list[Tensor]) -> list[Part]:
    if tensor.is_quantized:
        found.append(_bytes(tensor))
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            return [str(tensor.qscheme()), tensor.q_scale(), tensor.q_zero_point(), list(tensor.stride())]
        found += [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
        return [str(tensor.qscheme()), tensor.q_per_channel_axis(), list(tensor.stride())]
    if tensor.layout is torch.sparse_coo:
        found += [tensor._indices(), tensor._values()]
        return [tensor.is_coalesced()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        found += [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
        return []
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        found += [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
        return []
    raise _unreadable(tensor, f"has the layout {tensor.layout}")


def _bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _state(value: Any, found: list[Tensor], depth: int) -> Part:
    """A value beside the bytes of a tensor, as part of a key; tensors in it are appended to ``found``."""
    if depth > _DEEPEST:
        raise UnreadableWeightsError(f"a {type(value).__name__} within a weight is nested too deep")
    inner = depth + 1
    match value:
        case enum.Enum():  # before numbers, which some are
            return ("enum", _name(type(value)), value.name)
        case None | bool() | int() | float() | str() | bytes():
            return value
        case Tensor() if _is_plain(value):
            found.append(value)
            return "tensor"
        case Tensor():
            return _take_apart(value, found, inner)
        case torch.dtype() | torch.device() | torch.layout() | torch.memory_format() | torch.qscheme():
            return (type(value).__name__, str(value))
        case torch.SymInt() | torch.SymFloat() | torch.SymBool():
            raise UnreadableWeightsError("a weight has a symbolic size")
        case Mapping():
            return [
                (_state(key, found, inner), _state(part, found, inner))
                for key, part in value.items()
                if key != "_vlcache_digests"
            ]
        case list() | tuple():
            return [_name(type(value)), *(_state(part, found, inner) for part in value)]
        case set() | frozenset():
            return ["set", *sorted(str(_state(part, [], inner)) for part in value)]
        case type() | types.FunctionType() | types.BuiltinFunctionType():
            return ("name", f"{value.__module__}.{value.__qualname__}")
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
        return [_name(type(value)), _state(fields, found, inner)]
    text = repr(value)
    if getattr(type(value), "__repr__", None) is not object.__repr__ and " at 0x" not in text:
        return (_name(type(value)), text)
    if hasattr(value, "__dict__"):
        return [_name(type(value)), _state(vars(value), found, inner)]
    raise UnreadableWeightsError(f"a weight holds a {type(value).__name__}, of which no key can be made")


def _outer(tensor: Tensor) -> Part:
    sizes = [*tensor.shape, *(tensor.stride() if tensor.layout is torch.strided else ())]
    if not all(isinstance(size, int) for size in sizes):
        return [str(tensor.dtype), str(tensor.device.type), tensor.dim()]  # ragged: its leaves say the rest
    return [str(tensor.dtype), str(tensor.device.type), *(int(size) for size in sizes)]


def _has_own_dispatch(kind: type[Tensor]) -> bool:
    """True where operators do not see the tensor's own bytes."""
    return kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _unreadable(tensor: Tensor, why: str) -> UnreadableWeightsError:
    sizes: Sequence[Any] = () if tensor.is_nested else tensor.shape
    return UnreadableWeightsError(f"a weight ({type(tensor).__name__}, {list(sizes)}) {why}")
