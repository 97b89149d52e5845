"""Runs decoding steps, which have nothing to reuse, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlcache_fx.capture import Captured, InputKind
from vlcache_fx.capture.writes import deliver, overlapping
from vlcache_fx.lowering import Lowered
from vlcache_fx.runtime.unmodified import Compiled


class StepRunner:
    """A compiled step: call it with the graph's inputs, get the graph's outputs.

    Args:
        captured: the graph.
        step: its program, lowered. It writes rows to contiguous inputs by itself.
        unmodified: serves calls whose inputs are not what the program was made for.
    """

    def __init__(self, captured: Captured, step: Lowered, unmodified: Compiled) -> None:
        self._step, self._unmodified = step, unmodified
        self._writes, self._num_results = captured.writes, captured.num_results
        self._data = [index for index, kind in enumerate(captured.kinds) if kind is InputKind.DATA]
        self._written = [write.input for write in captured.writes if write.places is not None]

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Run one step."""
        if not self._writes:
            return self._step(args)
        if overlapping(self._writes, args, self._data) or not all(
            args[index].is_contiguous() for index in self._written
        ):
            return self._unmodified(*args)
        return deliver(self._writes, args, self._step(args), self._num_results)
