"""What the runtime is given to call: a lowered program, and arguments that may still be on their way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["Lowered", "PendingTensor", "arrived"]


@dataclass(frozen=True)
class PendingTensor:
    """A tensor argument on its way to the device; programs wait for it where they first read it.

    Attributes:
        tensor: valid once ``wait`` was called; in the layout that the program declares.
        wait: makes the current stream wait; need not block the host.
    """

    tensor: Tensor
    wait: Callable[[], None]

    def get(self) -> Tensor:
        """The tensor, usable by work that is queued from now on."""
        self.wait()
        return self.tensor


def arrived(value: Any) -> Any:
    """``value``, waited for where it is arriving."""
    return value.get() if isinstance(value, PendingTensor) else value


# Takes the program's placeholder values in order (tensors, arriving ones, ints) and returns its flat outputs.
# A call runs without autograd, changes no argument but those that the graph itself writes to, and keeps none
# of them alive after it returns.
Lowered: TypeAlias = Callable[[Sequence[Any]], tuple[Any, ...]]
