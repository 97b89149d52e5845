"""Runs passes in order and owns what they share: checks, dead code, lint, recompile, timing, dumps."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlcache_fx.errors import PassError, UnsupportedGraphError
from vlcache_fx.passes.base import Pass, Program


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: node counts around it and its time."""

    name: str
    changed: bool
    nodes_before: int
    nodes_after: int
    elapsed_ms: float


@dataclass(frozen=True)
class Pipeline:
    """An ordered list of passes.

    Attributes:
        passes: run first to last.
        dump: called with the pass name and the graph's text after every pass that changed something.
    """

    passes: tuple[Pass, ...]
    dump: Callable[[str, str], None] | None = None

    def run(self, program: Program) -> list[PassRecord]:
        """Run every pass on ``program`` in place.

        Raises:
            PassError: a pass failed, left a malformed graph, or was not given what it requires. It names the
                pass and the ones before it.
            UnsupportedGraphError: a pass refused the graph.
        """
        records: list[PassRecord] = []
        for step in self.passes:
            before = [record.name for record in records]
            held = program.properties | ({"facts"} if program.facts is not None else set())
            missing = sorted(step.requires - held)
            if missing:
                raise PassError(
                    step.name, before, f"requires {', '.join(missing)}, which no earlier pass ensures"
                )
            start, nodes_before = time.perf_counter(), len(program.graph.nodes)
            try:
                changed = step.run(program)
                if changed:
                    # Analysis facts refer to nodes, so dead ones among them must survive until the last pass.
                    if program.facts is None:
                        program.graph.eliminate_dead_code()
                    program.graph.lint()
            except UnsupportedGraphError:
                raise
            except Exception as error:
                raise PassError(step.name, before, f"{type(error).__name__}: {error}") from error
            program.properties |= step.ensures
            elapsed_ms = (time.perf_counter() - start) * 1e3
            records.append(PassRecord(step.name, changed, nodes_before, len(program.graph.nodes), elapsed_ms))
            if changed and self.dump is not None:
                self.dump(step.name, str(program.graph))
        program.graph.eliminate_dead_code()
        program.graph_module.recompile()
        return records

    def inserting(self, step: Pass, *, before: str | None = None, after: str | None = None) -> "Pipeline":
        """A pipeline with ``step`` placed next to the named pass (at the end where none is named)."""
        names = [known.name for known in self.passes]
        anchor = before or after
        if anchor is None:
            return Pipeline((*self.passes, step), self.dump)
        if anchor not in names:
            raise PassError(step.name, names, f"no pass is named {anchor!r}; there are {', '.join(names)}")
        place = names.index(anchor) + (after is not None)
        return Pipeline((*self.passes[:place], step, *self.passes[place:]), self.dump)

    def fingerprint(self) -> str:
        """Identifies the passes' code and order."""
        parts: Sequence[str] = [f"{step.name}:{step.fingerprint()}" for step in self.passes]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
