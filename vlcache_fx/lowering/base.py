"""What every lowering offers: a flat program graph in, a plain callable out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch.fx import GraphModule

__all__ = ["Arriving", "Decompositions", "Lowered", "Lowering"]


@dataclass(frozen=True)
class Arriving:
    """A tensor argument on its way to the device; programs wait for it where they first read it.

    Attributes:
        tensor: valid once ``wait`` was called; in the layout that the program declares.
        wait: makes the current stream wait; need not block the host.
    """

    tensor: torch.Tensor
    wait: Callable[[], None]

    def get(self) -> torch.Tensor:
        """The tensor, usable by work that is queued from now on."""
        self.wait()
        return self.tensor


def arrived(value: Any) -> Any:
    """``value``, waited for where it is arriving."""
    return value.get() if isinstance(value, Arriving) else value


# Takes the program's placeholder values in order (tensors, arriving ones, ints) and returns its flat outputs.
# A call runs without autograd, changes no argument but those that the graph itself writes to, and keeps none
# of them alive after it returns.
Lowered: TypeAlias = Callable[[Sequence[Any]], tuple[Any, ...]]

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
