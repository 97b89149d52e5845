"""Graphs of the option ``dry_run``: explained, and run as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlcache_fx.compiler.cross_attention import CrossAttention
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.explanation import GraphExplanation
from vlcache_fx.compiler.kinds import Classified, on_kind
from vlcache_fx.compiler.prefill import Prefill
from vlcache_fx.compiler.refused import SILENT, Refused
from vlcache_fx.compiler.traced import Traced
from vlcache_fx.compiler.unmodified import Compiled
from vlcache_fx.errors import Reason
from vlcache_fx.runtime.report import Report
from vlcache_fx.runtime.state import log


def explain_only(graph: Traced, engine: Engine) -> Compiled:
    """Log the explanation of a graph and add it to ``engine.explanations``; return the graph unmodified.

    Its calls are reported as they would be otherwise: those of decoders and of refused graphs.
    """

    def explained(kind: Classified) -> tuple[GraphExplanation, bool]:
        return kind.explain(), _is_reported(kind)

    explanation, is_reported = on_kind(graph, explained)
    engine.explanations.append(explanation)
    log.info("vlcache: dry run: %s", explanation.summary())
    unmodified = graph.unmodified
    graph.unmodified.release()

    def run(*args: Any) -> Sequence[Any]:
        if is_reported:
            engine.report(Report("bypass", Reason.DRY_RUN.text, reason_code=Reason.DRY_RUN))
        return unmodified(*args)

    return graph.entry(run)


def _is_reported(kind: Classified) -> bool:
    if isinstance(kind, Refused):
        return kind.refusal.reason not in SILENT
    return isinstance(kind, Prefill | CrossAttention)
