"""An encoder in a graph of its own.

Vision and audio towers that Dynamo traces separately from the decoder, or that a user compiles alone: all
attention is bidirectional and a float tensor (pixels, features) is an input, so the graph is a function of
its items. Results are stored by the content of the inputs; a hit skips the graph. Results that depend on no
attention (text in the same graph) are computed in every call. Reuse is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from vlcache_fx.analysis.encoder import is_encoder
from vlcache_fx.compiler.builders.runners import encoder_runner
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.explanation import GraphExplanation
from vlcache_fx.compiler.traced import Traced
from vlcache_fx.compiler.unmodified import Compiled
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.passes.partition.split_encoder import SplitResults, split_results


@dataclass(frozen=True)
class Encoder:
    """See the module's docstring.

    Attributes:
        graph: the traced graph.
        split: its results, split by whether they depend on attention.
    """

    name: ClassVar[str] = "encoder"
    graph: Traced
    split: SplitResults

    @classmethod
    def match(cls, graph: Traced) -> Self | None:
        """See ``Kind``."""
        if not is_encoder(graph.captured):
            return None
        if graph.captured.writes:
            raise UnsupportedGraphError(Reason.MUTATED_INPUTS, "the encoder writes to its inputs")
        return cls(graph, split_results(graph.captured))

    def compile(self, engine: Engine) -> Compiled:
        """See ``Kind``."""
        split, encoder = self.split, encoder_runner(self.split, engine, self.graph.clock)
        if not split.other_indices:
            return self.graph.rewritten(lambda *args: split.joined(encoder(args)[0], ()))
        others = engine.lower(split.others, name="rest of the encoder's graph")
        return self.graph.rewritten(lambda *args: split.joined(encoder(args)[0], others(args)))

    def explain(self) -> GraphExplanation:
        """See ``Kind``."""
        return GraphExplanation(self.name, nodes=(len(self.graph.captured.graph_module.graph.nodes),))
