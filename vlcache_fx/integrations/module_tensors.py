"""All weights of a model, in parameters, buffers and other places, listed in every request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlcache_fx.errors import UnreadableWeightsError

_OWN = frozenset(vars(nn.Module())) | {"_hf_hook"}
"""Attributes of every module, and accelerate's hook, whose offloaded weights are listed separately."""

_ATOMS = frozenset({type(None), bool, int, float, str, bytes, type, torch.dtype, torch.device})
_MAX_DEPTH = 4


class ModuleTensors:
    """Lists all tensors that a module computes with, without duplicates.

    These are ``[*module.parameters(), *module.buffers()]``, and

    - tensors in plain attributes of modules: states of quantisers, packed weights;
    - weights that accelerate offloads between calls.

    The list is current: replaced, added and removed tensors are seen. Only the walk over submodules is
    cached, until a submodule gets other children or attributes.

    Args:
        module: the module.
        min_bytes: smaller tensors in plain attributes are left out: models store results there, and
            ``ModuleState`` finds the ones that are read.
        without: submodules to leave out, with all that is found through them alone.
    """

    def __init__(self, module: nn.Module, *, min_bytes: int = 0, without: Sequence[nn.Module] = ()) -> None:
        self._module, self._min_bytes, self._without = module, min_bytes, tuple(without)
        self._modules: list[nn.Module] = []
        self._children: list[nn.Module | None] = []
        self._names: list[list[str]] = []
        self._others: list[tuple[dict[str, Any], str]] = []
        self._packed: dict[int, tuple[Any, list[Tensor]]] = {}

    def __call__(self) -> list[Tensor]:
        """Return the current tensors.

        Raises:
            UnreadableWeightsError: packed weights cannot be unpacked.
        """
        if not self._modules or self._children != _children(self._modules):
            found_by_name = self._module.named_modules(memo=set(self._without))
            self._modules = [module for _, module in found_by_name]
            self._children = _children(self._modules)
            self._names = []
        names = [list(vars(module)) for module in self._modules]
        if names != self._names:
            self._names = names
            self._others = [
                (vars(module), name)
                for module, attributes in zip(self._modules, names, strict=True)
                for name in attributes
                if name not in _OWN
            ]
        found = [tensor for module in self._modules for tensor in _registered(module)]
        seen: set[int] = set()
        packed = self._packed
        self._packed = {}
        for attributes, name in self._others:
            value = attributes[name]
            if type(value) not in _ATOMS:
                self._walk(value, found, seen, packed, 0)
        return list({id(tensor): tensor for tensor in found}.values())

    def _walk(
        self,
        value: Any,
        found: list[Tensor],
        seen: set[int],
        packed: dict[int, tuple[Any, list[Tensor]]],
        depth: int,
    ) -> None:
        """Append the tensors within an attribute to ``found``; visit each object once."""
        if isinstance(value, Tensor):
            if value.nbytes >= self._min_bytes:
                found.append(value)
            return
        if depth > _MAX_DEPTH or id(value) in seen or _has_no_tensors(value):
            return
        seen.add(id(value))
        if isinstance(value, torch.ScriptObject):
            # Unpacking creates new tensors each time; packed weights are never written to, so unpack once.
            cached = packed.get(id(value))
            self._packed[id(value)] = cached = (value, _unpack(value)) if cached is None else cached
            found += cached[1]
            return
        for part in _parts(value):
            self._walk(part, found, seen, packed, depth + 1)


def _has_no_tensors(value: Any) -> bool:
    """Return whether a value has no tensors of its own: submodules, functions, configurations."""
    kind = type(value)
    return (
        kind in _ATOMS or isinstance(value, nn.Module) or callable(value) or hasattr(kind, "to_json_string")
    )


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return value
    return list(getattr(value, "__dict__", {}).values())


def _registered(module: nn.Module) -> list[Tensor]:
    hook = vars(module).get("_hf_hook")
    maps = [] if hook is None else _weights_maps(hook)
    return [
        _offloaded(maps, name, tensor) if maps else tensor
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]


def _weights_maps(hook: Any) -> list[Any]:
    """Return the maps (name -> tensor) from which an accelerate hook loads a module's weights for a call."""
    hooks = [hook, *getattr(hook, "hooks", ())]  # a hook, or a sequence of hooks
    return [each.weights_map for each in hooks if getattr(each, "weights_map", None) is not None]


def _offloaded(maps: list[Any], name: str, tensor: Tensor) -> Tensor:
    # Preferred to the module's tensor, which is a new one in every call.
    for weights_map in maps:
        full_name = getattr(weights_map, "prefix", "") + name
        dataset = getattr(weights_map, "dataset", weights_map)
        # A loader from disk keeps some tensors in memory and reads the others in every call.
        tensors = getattr(dataset, "state_dict", dataset)
        offloaded = tensors.get(full_name) if isinstance(tensors, dict) else None
        if isinstance(offloaded, Tensor):
            return offloaded
    return tensor


def _unpack(value: Any) -> list[Tensor]:
    try:
        state = value.__getstate__()
    except (RuntimeError, TypeError, AttributeError) as error:
        text = " ".join(str(error).split())
        raise UnreadableWeightsError(f"packed weights ({value}) cannot be unpacked: {text}") from error
    return _tensors_in(state)


def _tensors_in(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, torch.ScriptObject):
        return _unpack(state)
    parts = _parts(state) if isinstance(state, Mapping | list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors_in(part)]


def _children(modules: list[nn.Module]) -> list[nn.Module | None]:
    return [child for module in modules for child in module._modules.values()]
