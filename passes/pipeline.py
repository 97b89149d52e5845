"""Runs passes in order and owns what they share: checks, dead code, lint, recompile, timing, graph logs."""

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
        name: for logs and dumps.
        dump: folder for the graphs before and after each pass, or None.
    """

    passes: tuple[Pass, ...]
    name: str = "passes"
    dump: Path | None = None

    def run(self, program: Program) -> list[PassRecord]:
        """Run every pass on ``program`` in place.

        Raises:
            PassError: a pass failed, left a malformed graph, or runs in the wrong order: a property that it
                requires does not hold, or one that it excludes does. Names the pass and those before it.
            UnsupportedGraphError: a pass refused the graph.
            OptionError: the graphs cannot be dumped.
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
            culprits = [one.name for one in self.passes if one.name in before and one.ensures & step.excludes]
            others = ", ".join(culprits) or "another pipeline"
            raise PassError(step.name, before, f"must run before {others} ({', '.join(early)})")

    def inserting(self, step: Pass, *, before: str | None = None, after: str | None = None) -> "Pipeline":
        """A pipeline with ``step`` next to the named pass (at the end where none is named).

        Raises:
            PassError: no pass has that name; lists the names.
        """
        names = [known.name for known in self.passes]
        anchor = before or after
        if anchor is None:
            return replace(self, passes=(*self.passes, step))
        if anchor not in names:
            raise PassError(step.name, names, f"no pass is named {anchor!r}; there are {', '.join(names)}")
        index = names.index(anchor) + (after is not None)
        return replace(self, passes=(*self.passes[:index], step, *self.passes[index:]))
