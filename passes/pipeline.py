"""Pipelines: run passes in order, with checks, dead-code removal, lint, timing and graph logs."""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

from vlcache_fx.errors import PassError, UnsupportedGraphError
from vlcache_fx.passes.base import Pass, Program
from vlcache_fx.passes.graph_log import GraphLog

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassRecord:
    """Node counts before and after a pass, and its time."""

    name: str
    changed: bool
    nodes_before: int
    nodes_after: int
    elapsed_ms: float


@dataclass(frozen=True)
class Pipeline:
    """A sequence of passes.

    Attributes:
        passes: the passes, in the order of execution.
        name: name in logs and dumps.
        dump: folder for the graphs before and after each pass, or None.
    """

    passes: tuple[Pass, ...]
    name: str = "passes"
    dump: Path | None = None

    def run(self, program: Program) -> list[PassRecord]:
        """Run every pass on ``program`` in place.

        Raises:
            PassError: a pass failed, left a malformed graph, or is in the wrong position: a property that it
                requires does not hold, or a property that it excludes does. Names the pass and those before.
            UnsupportedGraphError: a pass refused the graph.
            OptionError: the folder for dumps is not writable.
        """
        graphs = GraphLog(self.name, self.dump)
        graphs.show(0, "before", program.graph_module)
        records: list[PassRecord] = []
        for number, step in enumerate(self.passes, 1):
            before = [record.name for record in records]
            self._check_order(step, program, before)
            start, nodes_before = time.perf_counter(), len(program.graph.nodes)
            try:
                changed = step.run(program)
                if changed:
                    # Facts refer to nodes, so dead nodes must survive until after the last pass.
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
            _log.debug("%s: %s", self.name, records[-1])
            if changed:
                graphs.show(number, step.name, program.graph_module)
        program.graph.eliminate_dead_code()
        program.graph_module.recompile()
        return records

    def _check_order(self, step: Pass, program: Program, before: list[str]) -> None:
        missing = sorted(step.requires - program.held_properties)
        if missing:
            raise PassError(
                step.name, before, f"requires {', '.join(missing)}, which no earlier pass ensures"
            )
        early = sorted(step.excludes & program.held_properties)
        if early:
            earlier = [other for other in self.passes if other.name in before]
            culprits = [other.name for other in earlier if other.ensures & step.excludes]
            others = ", ".join(culprits) or "another pipeline"
            raise PassError(step.name, before, f"must run before {others} ({', '.join(early)})")

    def inserting(self, step: Pass, *, before: str | None = None, after: str | None = None) -> "Pipeline":
        """Return a pipeline with ``step`` before or after the named pass, or at the end without a name.

        Raises:
            PassError: no pass has that name; lists the valid names.
        """
        names = [known.name for known in self.passes]
        anchor = before or after
        if anchor is None:
            return replace(self, passes=(*self.passes, step))
        if anchor not in names:
            raise PassError(
                step.name, names, f"no pass is named {anchor!r}; the passes are: {', '.join(names)}"
            )
        index = names.index(anchor) + (after is not None)
        return replace(self, passes=(*self.passes[:index], step, *self.passes[index:]))
