"""Builds the runner of a rewritten program, which is lowered once, when first used."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlcache_fx.compiler.compile_clock import CompileClock
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiling import compiling
from vlcache_fx.errors import LoweringError
from vlcache_fx.lowering import CudaGraphs, Lowered
from vlcache_fx.passes import Program
from vlcache_fx.passes.standard import fitted_program, packed_program
from vlcache_fx.runtime.programs.run import ProgramRunner
from vlcache_fx.spec.program import ProgramSpec
from vlcache_fx.spec.slots import JumpAt


def program_spec(program: Program) -> ProgramSpec:
    """Return the spec of a program."""
    return ProgramSpec(tuple(program.slots), tuple(program.recorded), tuple(program.in_place))


def program_runner(
    name: str, program: Program, device: torch.device, engine: Engine, clock: CompileClock | None = None
) -> ProgramRunner:
    """Return the runner of a rewritten program, with the engine's lowering.

    Args:
        name: ``cold``, ``warm``, ``packed`` or ``fitted``.
        program: the program.
        device: device of its inputs.
        engine: has the lowering.
        clock: times of the steps that built the program.

    Raises:
        LoweringError: passes that lowerings require have not run.
    """

    program.check_complete()

    def lower() -> Lowered:
        lowered = engine.lower(program.graph_module, name=name, clock=clock)
        is_recorded = name != "cold" and device.type == "cuda" and engine.options.cuda_graphs
        is_recorded = is_recorded and JumpAt() not in program.slots  # `vlcache.recur` reads them on the host
        return CudaGraphs(lowered, in_place=program.in_place) if is_recorded else lowered

    return ProgramRunner(name, program_spec(program), Once(lower), device, engine)


class WarmVariants:
    """Runners of the variants of a warm program, each built when first needed.

    Args:
        warm: the warm program.
        device: device of its inputs.
        engine: has the lowering.
    """

    def __init__(self, warm: Program, device: torch.device, engine: Engine) -> None:
        self._warm, self._device, self._engine = warm, device, engine
        self._num_layers = warm.decoder.num_layers
        self._runners: dict[torch.dtype | None, ProgramRunner] = {}

    def packed(self, dtype: torch.dtype) -> ProgramRunner:
        """Return the runner for a donor with packed rows of this dtype."""
        return self._runner(dtype, "packed", lambda: packed_program(self._warm, dtype))

    def fitted(self) -> ProgramRunner:
        """Return the runner that fits donors of several contexts."""
        return self._runner(None, "fitted", lambda: fitted_program(self._warm))

    def _runner(self, key: torch.dtype | None, name: str, build: Callable[[], Program]) -> ProgramRunner:
        if key not in self._runners:
            with compiling():
                if key not in self._runners:
                    clock = CompileClock(num_layers=self._num_layers)
                    with clock.measure("passes"):
                        program = build()
                    self._runners[key] = program_runner(name, program, self._device, self._engine, clock)
        return self._runners[key]


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
