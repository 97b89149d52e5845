"""What a captured graph is, and so what is done with it: told once, for the backend and for explanations."""

from dataclasses import dataclass
from enum import StrEnum

from vlcache_fx.analysis import DecoderFacts, analyze
from vlcache_fx.analysis.decoder.cross_attention import find_cross_attended
from vlcache_fx.analysis.decoder.merge import find_lone_merge
from vlcache_fx.analysis.encoder import is_encoder
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir import Captured
from vlcache_fx.passes.partition.split_encoder import SplitEncoder, split_encoder


class GraphKind(StrEnum):
    """What becomes of a graph."""

    ENCODER = "encoder"
    """Its results are kept under the content of its inputs."""
    MERGE = "merge"
    """It attends to nothing: the spans in what it returns are marked for the decoder's graph."""
    CROSS_ATTENDING = "cross-attending decoder"
    """What it computes of the items alone is kept."""
    DECODER = "decoder"
    """Rewritten: spans of tokens are reused."""


@dataclass(frozen=True)
class Classified:
    """A graph's kind, and what was found on the way.

    Attributes:
        kind: of the graph.
        facts: of a decoder.
        split: the encoder inside a decoder's graph and the rest; None where features come from outside.
    """

    kind: GraphKind
    facts: DecoderFacts | None = None
    split: SplitEncoder | None = None


def classify(captured: Captured) -> Classified:
    """Tell what a graph is.

    Raises:
        UnsupportedGraphError: it is none of the kinds, for the reason given.
    """
    if is_encoder(captured):
        if captured.writes:
            raise UnsupportedGraphError(Reason.MUTATED_INPUTS, "an encoder that writes to its inputs")
        return Classified(GraphKind.ENCODER)
    if find_lone_merge(captured.graph_module.graph) is not None:
        return Classified(GraphKind.MERGE)
    attended = split_encoder(captured, find_cross_attended(captured))
    if attended is not None and attended.computes:
        return Classified(GraphKind.CROSS_ATTENDING, split=attended)
    facts = analyze(captured)
    if not facts.merges and facts.stream.boundaries[0].op != "placeholder":
        raise UnsupportedGraphError(Reason.NO_MERGE, "no encoder features enter the token embeddings")
    return Classified(GraphKind.DECODER, facts, split_encoder(captured, facts.encoder))
