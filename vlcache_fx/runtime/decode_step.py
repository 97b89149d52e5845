"""Serves decoding steps. They have no rows to reuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vlcache_fx.runtime.mutations import apply_input_mutations, inputs_allow_mutation
from vlcache_fx.runtime.programs.lowered import Lowered
from vlcache_fx.spec.mutations import DecodeStepSpec


class DecodeStepRunner:
    """A compiled decoding step: takes the graph's inputs, returns its outputs.

    Args:
        spec: spec of the step.
        lowered: its lowered program.
        unmodified: serves calls whose inputs overlap or are not contiguous.
    """

    def __init__(
        self, spec: DecodeStepSpec, lowered: Lowered, unmodified: Callable[..., Sequence[Any]]
    ) -> None:
        self._spec, self._lowered, self._unmodified = spec, lowered, unmodified

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Run one decoding step."""
        spec = self._spec
        if not inputs_allow_mutation(spec.writes, spec.in_place, args, spec.data):
            return self._unmodified(*args)
        return apply_input_mutations(spec.writes, args, self._lowered(args), spec.num_results)
