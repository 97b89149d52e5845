"""A model's parameters and buffers, listed in every request."""

from __future__ import annotations

from torch import Tensor, nn


class ModuleTensors:
    """Lists what ``[*module.parameters(), *module.buffers()]`` holds, each tensor once, but quicker.

    Whatever was replaced, added or removed since is seen: only the walk over submodules is saved, as long as
    all of them have the children that they had.

    Args:
        module: of which they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._modules: list[nn.Module] = []
        self._children: list[nn.Module | None] = []

    def __call__(self) -> list[Tensor]:
        """The tensors now."""
        if not self._modules or self._children != _children(self._modules):
            self._modules = list(self._module.modules())
            self._children = _children(self._modules)
        found = [
            tensor
            for module in self._modules
            for tensors in (module._parameters, module._buffers)
            for tensor in tensors.values()
            if tensor is not None
        ]
        return list({id(tensor): tensor for tensor in found}.values())


def _children(modules: list[nn.Module]) -> list[nn.Module | None]:
    return [child for module in modules for child in module._modules.values()]
