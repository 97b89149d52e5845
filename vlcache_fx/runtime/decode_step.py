"""Runs decoding steps layer by layer. They have nothing to reuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vlcache_fx.capture.mutations import can_write, deliver
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.lowering import Lowered
from vlcache_fx.passes import Program


class DecodeStepRunner:
    """A compiled decoding step: call it with the graph's inputs, get the graph's outputs.

    Args:
        captured: the graph.
        program: made of it.
        lowered: the program.
        unmodified: serves calls whose inputs do not allow the program's mutations.
    """

    def __init__(
        self, captured: Captured, program: Program, lowered: Lowered, unmodified: Callable[..., Sequence[Any]]
    ) -> None:
        self._lowered, self._unmodified = lowered, unmodified
        self._writes, self._num_results = captured.writes, captured.num_results
        self._data = captured.indices_of(InputKind.DATA)
        self._in_place = tuple(program.in_place)

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Run one decoding step."""
        if not can_write(self._writes, self._in_place, args, self._data):
            return self._unmodified(*args)
        return deliver(self._writes, args, self._lowered(args), self._num_results)
