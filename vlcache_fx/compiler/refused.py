"""A graph without reuse: it runs unmodified, compiled as plain ``torch.compile`` would compile it.

Prompts of text, parts of models between graph breaks, and all graphs that analysis refuses (see ``Reason``).
Prompts of text are reported, and parts of models are not. Any other refusal is logged once, reported with
each call, and raised in strict mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vlcache_fx.analysis import analyze
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.explanation import GraphExplanation
from vlcache_fx.compiler.traced import Traced
from vlcache_fx.compiler.unmodified import Compiled
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.runtime.report import Report, one_line

SILENT = frozenset({Reason.NO_ATTENTION, Reason.PAST_KEYS})
"""Parts of a model, and decoding steps: neither logged, raised nor reported."""

NOT_AN_ERROR = frozenset({Reason.NO_MERGE})
"""Prompts of text alone: reported, but neither logged nor raised."""


@dataclass(frozen=True)
class Refused:
    """See the module's docstring.

    Attributes:
        graph: the traced graph.
        refusal: the reason.
    """

    name: ClassVar[str] = "unmodified"
    graph: Traced
    refusal: UnsupportedGraphError

    def compile(self, engine: Engine) -> Compiled:
        """See ``Kind``.

        Raises:
            UnsupportedGraphError: the refusal, in strict mode.
        """
        refusal = self.refusal
        if refusal.reason in SILENT:
            return self.graph.unmodified.prepare(engine)
        if refusal.reason is Reason.GRAD_REQUIRED:
            engine.refuse_call(refusal)
        elif refusal.reason not in NOT_AN_ERROR:
            engine.refuse(refusal)
        compiled, continues = self.graph.unmodified.prepare(engine), self._continues()

        def run(*args: Any) -> Sequence[Any]:
            report = Report("bypass", one_line(str(refusal)), reason_code=refusal.reason)
            engine.report(report, continues=continues)
            return compiled(*args)

        return run

    def explain(self) -> GraphExplanation:
        """See ``Kind``."""
        return GraphExplanation(self.name, str(self.refusal), reason_code=self.refusal.reason)

    def _continues(self) -> bool:
        """Return True for text that continues a growing cache: a draft to verify, a chunk of a prompt."""
        if self.refusal.reason is not Reason.NO_MERGE or self.graph.captured.writes:
            return False
        return bool(analyze(self.graph.captured).past)
