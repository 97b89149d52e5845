"""The interface of lowerings."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch.fx import GraphModule

from vlcache_fx.runtime.programs.lowered import Lowered

__all__ = ["Decompositions", "Lowering"]


# Overload of one of this package's operators -> a function of the same signature in ATen, for compilers.
Decompositions: TypeAlias = Mapping[torch._ops.OpOverload, Callable[..., Any]]


class Lowering(Protocol):
    """Compiler of pre-dispatch ATen graphs whose inputs are all placeholders.

    The graphs are functional, except for input mutations; nothing else reads a mutated input.
    """

    @property
    def name(self) -> str:
        """Name of the lowering, as in ``options={"lowering": name}``."""

    def lower(self, program: GraphModule, *, name: str) -> Lowered:
        """Lower ``program``; ``name`` appears in logs and errors.

        The graph is not changed, and the caller may change it afterwards.

        Raises:
            LoweringError: the program cannot be lowered; names the program and the segment.
        """
