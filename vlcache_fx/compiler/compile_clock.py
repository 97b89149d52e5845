"""Times of the steps of a compilation, and its line in the log."""

from __future__ import annotations

from collections.abc import Mapping

from vlcache_fx.runtime.clock import Clock

PROGRAMS: Mapping[str, str] = {
    "cold": "cold program",
    "warm": "warm program",
    "packed": "warm program for packed donors",
    "fitted": "warm program for donors of several contexts",
}
"""Words for the names of programs; other names are words already."""

STEPS = ("capture", "analysis", "passes", "lowering")
"""Steps of a compilation, in order."""


class CompileClock(Clock):
    """Milliseconds per step of the compilation of one program.

    Args:
        graph: clock of the steps that the programs of a graph share. The first program that is compiled has
            their times.
        num_layers: decoder layers of the program; 0 where they are unknown.
    """

    def __init__(self, graph: Clock | None = None, num_layers: int = 0) -> None:
        super().__init__()
        self.num_layers = num_layers
        self._graph = graph

    def take(self) -> dict[str, float]:
        """Return the milliseconds of all steps, in order; the next program of the graph has its own only."""
        graph, self._graph = self._graph, None
        shared = {} if graph is None else dict(graph.elapsed_ms)
        if graph is not None:
            graph.elapsed_ms.clear()
        found = {step: shared.get(step, 0.0) + self.elapsed_ms.get(step, 0.0) for step in STEPS}
        return {step: elapsed_ms for step, elapsed_ms in found.items() if elapsed_ms}


def compile_line(name: str, model: str, lowering: str, clock: CompileClock, segments: str = "") -> str:
    """Return the line of the log for a compiled program.

    Args:
        name: name of the program, such as ``cold``.
        model: class of the model; empty where it is unknown.
        lowering: name of the lowering.
        clock: has the times, which are taken.
        segments: what the lowering compiled; empty for one that compiles nothing.
    """
    layers = f", {clock.num_layers} layer{'s' * (clock.num_layers > 1)}" if clock.num_layers else ""
    program = PROGRAMS.get(name, name) + (f" of {model}" if model else "") + layers
    found = clock.take()
    elapsed_s = sum(found.values()) / 1e3
    steps = ", ".join(f"{step} {elapsed_ms / 1e3:.1f}" for step, elapsed_ms in found.items())
    more = f"; {segments}" if segments else ""
    return f"vlcache: compiled {program}, lowering {lowering}, in {elapsed_s:.1f} s ({steps}{more})"
