"""What every lowering offers: a flat program graph in, a plain callable out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch.fx import GraphModule

from vlcache_fx.runtime.programs.lowered import Lowered

__all__ = ["Decompositions", "Lowering"]


# Operators of ours that a compiler should see through: overload -> a function of the same signature in ATen.
Decompositions: TypeAlias = Mapping[torch._ops.OpOverload, Callable[..., Any]]


class Lowering(Protocol):
    """Turns a pre-dispatch ATen graph, whose inputs are all placeholders, into a callable.

    The graph is functional but for writes to inputs whose only reader is the write.
    """

    @property
    def name(self) -> str:
        """The registered name, as in `options={"lowering": name}`."""

    def lower(self, program: GraphModule, *, name: str) -> Lowered:
        """Lowers one program; `name` appears in logs and errors.

        The graph is not changed and may be changed by the caller afterwards.

        Raises:
            LoweringError: if the program cannot be lowered; the message names the program and the segment.
        """
