"""A model's parameters and buffers, and whatever else holds its weights, listed in every request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlcache_fx.errors import UnreadableWeightsError

_OWN = frozenset(vars(nn.Module())) | {"_hf_hook"}
"""Attributes of every module, and accelerate's hook: of it, the weights that it keeps are listed, no more."""

_ATOMS = frozenset({type(None), bool, int, float, str, bytes, type, torch.dtype, torch.device})
_DEEPEST = 4


class ModuleTensors:
    """Lists all tensors that a module computes with, each once.

    These are what ``[*module.parameters(), *module.buffers()]`` holds, and

    - tensors that are plain attributes of a module, or lie in one: states of quantisers, packed weights;
    - for a module whose weights accelerate keeps elsewhere between calls, those that it keeps.

    Whatever was replaced, added or removed since is seen: only the walk over submodules is saved, as long as
    all of them have the children and the attributes that they had.

    Args:
        module: of which they are.
        min_bytes: of tensors in plain attributes, those that are smaller are left out: a model leaves
            results there for later, and ``ModuleState`` knows which of them are read.
    """

    def __init__(self, module: nn.Module, *, min_bytes: int = 0) -> None:
        self._module, self._min_bytes = module, min_bytes
        self._modules: list[nn.Module] = []
        self._children: list[nn.Module | None] = []
        self._names: list[list[str]] = []
        self._others: list[tuple[dict[str, Any], str]] = []
        self._packed: dict[int, tuple[Any, list[Tensor]]] = {}

    def __call__(self) -> list[Tensor]:
        """The tensors now.

        Raises:
            UnreadableWeightsError: weights are packed so that their bytes cannot be had.
        """
        if not self._modules or self._children != _children(self._modules):
            self._modules = list(self._module.modules())
            self._children = _children(self._modules)
            self._names = []
        names = [list(vars(module)) for module in self._modules]
        if names != self._names:
            self._names = names
            self._others = [
                (vars(module), name)
                for module, own in zip(self._modules, names, strict=True)
                for name in own
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
        """Appends the tensors within an attribute. Settings are many, so each object is looked at once."""
        if isinstance(value, Tensor):
            if value.nbytes >= self._min_bytes:
                found.append(value)
            return
        if depth > _DEEPEST or id(value) in seen or _holds_none(value):
            return
        seen.add(id(value))
        if isinstance(value, torch.ScriptObject):
            # What it unpacks to is made anew each time, and it is never written to: once is enough.
            known = packed.get(id(value))
            self._packed[id(value)] = known = (value, _unpacked(value)) if known is None else known
            found += known[1]
            return
        for part in _parts(value):
            self._walk(part, found, seen, packed, depth + 1)


def _holds_none(value: Any) -> bool:
    """True for values without tensors of their own: submodules, functions, configurations."""
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
    kept = [] if hook is None else _kept_by(hook)
    return [
        _kept(kept, name, tensor) if kept else tensor
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]


def _kept_by(hook: Any) -> list[Any]:
    """The maps, name to tensor, from which an accelerate hook brings a module's weights in for a call."""
    hooks = [hook, *getattr(hook, "hooks", ())]  # one hook, or several in a row
    return [one.weights_map for one in hooks if getattr(one, "weights_map", None) is not None]


def _kept(maps: list[Any], name: str, tensor: Tensor) -> Tensor:
    # Before what the module has: within a call, that is another tensor each time.
    for kept in maps:
        full = getattr(kept, "prefix", "") + name
        dataset = getattr(kept, "dataset", kept)
        # Of a loader from disk, what it holds in memory; the rest it reads anew each time.
        held = getattr(dataset, "state_dict", dataset)
        found = held.get(full) if isinstance(held, dict) else None
        if isinstance(found, Tensor):
            return found
    return tensor


def _unpacked(value: Any) -> list[Tensor]:
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
        return _unpacked(state)
    parts = _parts(state) if isinstance(state, Mapping | list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors_in(part)]


def _children(modules: list[nn.Module]) -> list[nn.Module | None]:
    return [child for module in modules for child in module._modules.values()]
