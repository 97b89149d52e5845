"""A merge in a graph of its own.

Models that break the graph between the merge and the decoder, for example to build masks that cannot be
traced. The graph writes encoder features over token embeddings and has no attention. It runs unmodified;
media spans are marked in its result for the decoder's graph. This graph reuses nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from vlcache_fx.compiler.builders.spans import merge_marks
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.explanation import GraphExplanation
from vlcache_fx.compiler.traced import Traced
from vlcache_fx.compiler.unmodified import Compiled
from vlcache_fx.runtime.merge import MergeMarks


@dataclass(frozen=True)
class Merge:
    """See the module's docstring.

    Attributes:
        graph: the traced graph.
        marks: marks the media spans of its result.
    """

    name: ClassVar[str] = "merge"
    graph: Traced
    marks: MergeMarks

    @classmethod
    def match(cls, graph: Traced) -> Self | None:
        """See ``Kind``."""
        marks = merge_marks(graph.captured)
        return None if marks is None else cls(graph, marks)

    def compile(self, engine: Engine) -> Compiled:
        """See ``Kind``."""
        marks, merge = self.marks, self.graph.unmodified.prepare(engine)

        def run(*args: Any) -> Sequence[Any]:
            return marks.mark(args, merge(*args))

        return self.graph.rewritten(run)

    def explain(self) -> GraphExplanation:
        """See ``Kind``."""
        return GraphExplanation(self.name, nodes=(len(self.graph.captured.graph_module.graph.nodes),))
