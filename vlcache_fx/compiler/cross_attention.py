"""A decoder that attends to its items through cross-attention.

Mllama (Llama 3.2 Vision) and other decoders whose text queries attend to keys and values of an image; the
image never enters the token sequence. All values that depend on the items alone, these keys and values
included, are stored by the content of the items. The rest, all text, is computed in every call. Reuse is
exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from vlcache_fx.analysis.decoder.cross_attention import find_cross_attended
from vlcache_fx.compiler.builders.runners import encoder_runner
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.explanation import GraphExplanation
from vlcache_fx.compiler.traced import Traced
from vlcache_fx.compiler.unmodified import Compiled
from vlcache_fx.passes.partition.split_encoder import SplitEncoder, split_encoder
from vlcache_fx.runtime.cross_attention import CrossAttendingRunner


@dataclass(frozen=True)
class CrossAttention:
    """See the module's docstring.

    Attributes:
        graph: the traced graph.
        split: the part that depends on the items alone, and the rest.
    """

    name: ClassVar[str] = "cross-attending decoder"
    graph: Traced
    split: SplitEncoder

    @classmethod
    def match(cls, graph: Traced) -> Self | None:
        """See ``Kind``."""
        split = split_encoder(graph.captured, find_cross_attended(graph.captured))
        return cls(graph, split) if split is not None and split.computes else None

    def compile(self, engine: Engine) -> Compiled:
        """See ``Kind``."""
        encoder = encoder_runner(self.split, engine, self.graph.clock)
        decoder = engine.lower(self.split.decoder.graph_module, name=self.name)
        return self.graph.rewritten(CrossAttendingRunner(encoder, decoder, engine))

    def explain(self) -> GraphExplanation:
        """See ``Kind``."""
        return GraphExplanation(
            self.name,
            encoder_in_graph=True,
            nodes=(len(self.graph.captured.graph_module.graph.nodes),),
        )
