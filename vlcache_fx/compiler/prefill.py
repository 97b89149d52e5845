"""The prefill of a decoder-only model: a graph over all tokens of a prompt.

LLaVA, Qwen-VL, InternVL, Gemma 3 and most other vision-language models: encoder features replace the
embeddings of placeholder tokens, followed by layers of causal self-attention. The features come from the same
graph, from another graph (which marks their spans) or from the caller. The graph becomes two programs: the
cold program computes all rows and records keys and values of each media span; the warm program computes the
rows that the policy selects and reads the others from donors. An encoder in the same graph is split off and
its results are stored, as in ``encoder``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from vlcache_fx.analysis import DecoderFacts, LayerSplit, analyze
from vlcache_fx.compiler.builders.runners import decoder_programs, decoder_runner, encoder_runner
from vlcache_fx.compiler.engine import Engine
from vlcache_fx.compiler.explanation import GraphExplanation
from vlcache_fx.compiler.layer_graph import layer_graph
from vlcache_fx.compiler.traced import Traced
from vlcache_fx.compiler.unmodified import Compiled
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir import Captured
from vlcache_fx.lowering.tensorrt import dry_run
from vlcache_fx.passes.partition.split_encoder import SplitEncoder, split_encoder
from vlcache_fx.spec.slots import Key, StoredSlot, Value


@dataclass(frozen=True)
class Prefill:
    """See the module's docstring.

    Attributes:
        graph: the traced graph.
        facts: analysis of the whole graph.
        split: the encoder and the decoder; None where features are inputs of the graph.
    """

    name: ClassVar[str] = "decoder"
    graph: Traced
    facts: DecoderFacts
    split: SplitEncoder | None

    @classmethod
    def match(cls, graph: Traced) -> Self:
        """See ``Kind``. The last kind with reuse: it refuses all other graphs."""
        facts = analyze(graph.captured)
        if not facts.merges and facts.stream.boundaries[0].op != "placeholder":
            raise UnsupportedGraphError(Reason.NO_MERGE, "no encoder features enter the token embeddings")
        return cls(graph, facts, split_encoder(graph.captured, facts.encoder))

    @property
    def decoder(self) -> Captured:
        """The decoder's graph, with features as inputs."""
        return self.graph.captured if self.split is None else self.split.decoder

    @property
    def decoder_facts(self) -> DecoderFacts:
        """Analysis of ``decoder``."""
        return self.facts if self.split is None else self.facts.without_encoder(self.split.nodes)

    def compile(self, engine: Engine) -> Compiled:
        """See ``Kind``."""
        split, unmodified, original = self.split, self.graph.unmodified, len(self.graph.captured.kinds)
        decoder = decoder_runner(
            self.decoder,
            engine,
            lambda *args: unmodified(*args[:original]),
            self.graph.pipelines,
            self.decoder_facts,
            self.graph.clock,
        )
        if not self.facts.merges:
            unmodified.prepare(engine)  # serves calls without marked spans
        if split is None:
            return self.graph.rewritten(lambda *args: decoder(args))
        if not split.computes:
            return self.graph.rewritten(lambda *args: decoder([*args, *split.encoder(*args)]))
        encoder = encoder_runner(split, engine)

        def run(*args: Any) -> Sequence[Any]:
            features, hit = encoder(args)
            return decoder([*args, *features], encoder_hit=hit)

        return self.graph.rewritten(run)

    def explain(self) -> GraphExplanation:
        """See ``Kind``."""
        facts = self.facts
        _, cold, warm = decoder_programs(self.decoder, self.graph.pipelines, self.decoder_facts)
        selection, engines = facts.tail_rows.selection, dry_run(warm.graph_module)
        graphs = (self.graph.captured.graph_module.graph, cold.graph, warm.graph)
        return GraphExplanation(
            kind=self.name,
            num_layers=facts.num_layers,
            merges=tuple(merge.node.name for merge in facts.merges),
            encoder_in_graph=bool(facts.encoder),
            key_frontiers=_frontiers(facts, Key),
            value_frontiers=_frontiers(facts, Value),
            attention=tuple(map(_mixing, facts.layers)),
            results_need="all rows" if selection is None else str(selection.format_node()),
            nodes=tuple(len(graph.nodes) for graph in graphs),
            engines=engines.engines,
            outside_engines=dict(engines.outside),
            layer=layer_graph(self.decoder, self.decoder_facts, warm, self.graph.input_names),
        )


def _frontiers(facts: DecoderFacts, kind: type[StoredSlot]) -> tuple[str, ...]:
    return tuple(found.node.name for found in facts.frontiers if isinstance(found.slot, kind))


def _mixing(layer: LayerSplit) -> str:
    """Return in a word how tokens of a layer mix."""
    if layer.site is None:
        return "recurrent" if layer.recurrences else "convolution"
    return "causal" if layer.site.mask is None else "mask"
