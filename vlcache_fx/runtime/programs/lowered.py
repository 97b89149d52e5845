"""Lowered programs, and tensor arguments that may still be pending."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from vlcache_fx.errors import VlcacheError

__all__ = [
    "Lowered",
    "PendingTensor",
    "ProgramInterruptedError",
    "between_steps",
    "current_check",
    "resolved",
]


class ProgramInterruptedError(VlcacheError):
    """A program was stopped between two of its steps; it has no results."""


_check: ContextVar[Callable[[], None] | None] = ContextVar("vlcache_between_steps", default=None)


@contextmanager
def between_steps(check: Callable[[], None]) -> Iterator[None]:
    """Call ``check`` before each step of the programs that this thread runs in the body.

    It may raise ``ProgramInterruptedError``. Programs of the eager lowering are one step.
    """
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def current_check() -> Callable[[], None] | None:
    """Return what a program calls before each of its steps; None for nothing."""
    return _check.get()


def _no_wait() -> None:
    """The tensor is there, or its function waits."""


@dataclass(frozen=True)
class PendingTensor:
    """A tensor argument that is still copied to the device, or made, when programs first read it.

    Attributes:
        tensor: valid after ``wait``, in the layout that the program declares; or a function that returns it
            then. Such a tensor need not exist before its layer runs, nor after it: it is not kept.
        wait: makes the current stream wait for the copy; need not block the host. By default nothing.
    """

    tensor: Tensor | Callable[[], Tensor]
    wait: Callable[[], None] = _no_wait

    def get(self) -> Tensor:
        """Wait, and return the tensor for work that is queued from now on."""
        self.wait()
        return self.tensor if isinstance(self.tensor, Tensor) else self.tensor()


def resolved(value: Any) -> Any:
    """Return ``value``, or the tensor of a pending one."""
    return value.get() if isinstance(value, PendingTensor) else value


# Takes the values of the program's placeholders in order (tensors, pending tensors, ints); returns its flat
# outputs. A call runs without autograd, writes only to arguments that the graph itself mutates, and keeps no
# argument alive after it returns.
Lowered: TypeAlias = Callable[[Sequence[Any]], tuple[Any, ...]]
