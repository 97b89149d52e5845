"""Everything that stored rows depend on: computation, inputs and weights.

A stored row is reused only if all of these are equal. The computation is a canonical digest, from the graph's
inputs to the stored rows: operators, constants and dataflow. It leaves out differences between the graphs of
one model that change no value: copies, chains of views, names, the order of independent operators, and
whether a length is a number or a symbol.

It also leaves out three kinds of nodes whose *values* are part of each call's keys:

- integers computed from the request alone (positions, token ids): ``Leaf``;
- attention masks (``runtime.requests.masks``);
- merged embeddings: keys contain spans and the bytes of their features.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from vlcache_fx.analysis.decoder.computation_writer import RowWriter
from vlcache_fx.analysis.decoder.facts import DecoderFacts
from vlcache_fx.analysis.decoder.leaves import Leaf
from vlcache_fx.ir import Captured
from vlcache_fx.keys.digest import content_digest
from vlcache_fx.spec.decoder import Digests

__all__ = ["Computation", "Digests", "Leaf", "computation_of"]


@dataclass(frozen=True)
class Computation:
    """Everything that stored rows depend on besides masks and merged features.

    Attributes:
        digests: digests of the computation from token ids, or from embeddings that are an input.
        leaves: the leaves, in the order of their numbers in ``digests.separate``.
        weights: weights that are not in ``facts.weights``, such as token embeddings and rotary tables.
    """

    digests: Digests
    leaves: tuple[Leaf, ...]
    weights: tuple[Node, ...]


def computation_of(captured: Captured, facts: DecoderFacts) -> Computation:
    """Return the computation of the stored rows.

    Raises:
        UnsupportedGraphError: RANDOM, if they depend on random numbers.
    """
    results = [
        *(frontier.node for frontier in facts.frontiers),
        *(tail.convolution.source for tail in facts.tails),
        *(state.recurrence.node for state in facts.states),
        facts.stream.boundaries[-1],
    ]

    def write(writer: RowWriter) -> str:
        rows = [writer.text(node) for node in results]
        if not facts.merges:  # the embeddings are an input, whose rows keys contain
            return content_digest(rows)
        writer.include_embeddings()
        return content_digest([*rows, writer.text(facts.stream.boundaries[0])])

    first, second = RowWriter(captured, facts), RowWriter(captured, facts, unifies=True)
    digests = Digests(write(first), write(second))
    return Computation(digests, tuple(first.leaves.found.values()), tuple(first.more_weights))
