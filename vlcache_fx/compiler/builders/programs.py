"""Builds the runner of a rewritten program, which is lowered once, when first used."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiling import compiling
from vlcache_fx.errors import LoweringError
from vlcache_fx.lowering import CudaGraphs, Lowered
from vlcache_fx.passes import Program
from vlcache_fx.runtime.programs.run import ProgramRunner
from vlcache_fx.spec.program import ProgramSpec


def program_spec(program: Program) -> ProgramSpec:
    """Return the spec of a program."""
    return ProgramSpec(tuple(program.slots), tuple(program.recorded), tuple(program.in_place))


def program_runner(name: str, program: Program, device: torch.device, engine: Engine) -> ProgramRunner:
    """Return the runner of a rewritten program, with the engine's lowering.

    Args:
        name: ``cold`` or ``warm``.
        program: the program.
        device: device of its inputs.
        engine: has the lowering.

    Raises:
        LoweringError: passes that lowerings require have not run.
    """

    program.check_complete()

    def lower() -> Lowered:
        lowered = engine.lower(program.graph_module, name=name)
        is_recorded = name == "warm" and device.type == "cuda" and engine.options.cuda_graphs
        return CudaGraphs(lowered, in_place=program.in_place) if is_recorded else lowered

    return ProgramRunner(name, program_spec(program), Once(lower), device, engine)


class Once:
    """Lowers in the first call, for all threads; returns or raises the same in later calls."""

    def __init__(self, lower: Callable[[], Lowered]) -> None:
        self._lower = lower
        self._outcome: Lowered | LoweringError | None = None

    def __call__(self) -> Lowered:
        """The lowered program.

        Raises:
            LoweringError: it cannot be lowered.
        """
        with compiling():
            if self._outcome is None:
                try:
                    self._outcome = self._lower()
                except LoweringError as error:
                    self._outcome = error
        if isinstance(self._outcome, LoweringError):
            raise self._outcome
        return self._outcome
