"""What stored rows depend on: how they are computed, from which inputs and which weights.

A stored row may serve only where all of it is equal. The computation is written as a canonical digest, from
the graph's inputs to the stored rows: every operator, every constant, and the order of dataflow. Left out is
what changes no value, because a model's graphs differ in it: copies, chains of views, names, the order of
independent operators, and whether a length is a number or a symbol.

Three things are left out because their *values* are part of keys, call by call:

- whole numbers that are made of the request alone (positions, token ids): ``Leaf``;
- attention masks (``runtime.requests.masks``);
- what a merge puts in the place of token embeddings: spans and the bytes of their features.
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
    """Everything that stored rows depend on beside masks and merged features.

    Attributes:
        digests: how they are computed, from token ids on, or from the embeddings that the graph is given.
        leaves: in the order in which ``digests.separate`` numbers them.
        weights: weights that ``facts.weights`` does not list: of token embeddings, of rotary tables.
    """

    digests: Digests
    leaves: tuple[Leaf, ...]
    weights: tuple[Node, ...]


def computation_of(captured: Captured, facts: DecoderFacts) -> Computation:
    """How the rows that ``facts`` stores are computed.

    Raises:
        UnsupportedGraphError: RANDOM, where they depend on random numbers.
    """
    beside = [*(one.node for one in facts.frontiers), facts.stream.boundaries[-1]]

    def write(writer: RowWriter) -> str:
        rows = [writer.text(node) for node in beside]
        if not facts.merges:  # the embeddings are an input; keys hold their rows in another way
            return content_digest(rows)
        writer.uncut()
        return content_digest([*rows, writer.text(facts.stream.boundaries[0])])

    first, second = RowWriter(captured, facts), RowWriter(captured, facts, unifies=True)
    digests = Digests(write(first), write(second))
    return Computation(digests, tuple(first.leaves.found.values()), tuple(first.more_weights))
