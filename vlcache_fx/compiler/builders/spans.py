"""Builds the spec of media spans."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.analysis.decoder.merge import Deepstack, Merge, find_lone_merge
from vlcache_fx.ir import Captured
from vlcache_fx.ir.subgraph import extract
from vlcache_fx.runtime.merge import MergeMarks
from vlcache_fx.spec.decoder import SpanSpec
from vlcache_fx.spec.program import MergeSpec


def span_spec(facts: DecoderFacts, index: Mapping[Node, int]) -> SpanSpec:
    """Return the span spec of a decoder whose features are inputs, given the index of each input."""
    width = facts.merges[-1].node.meta["val"].shape[-1] if facts.merges else None
    return SpanSpec(
        features=tuple(index[entry.features] for entry in _entries(facts)),
        num_merges=len(facts.merges),
        embeddings=None if facts.merges else index[facts.stream.boundaries[0]],
        width=width if isinstance(width, int) else None,
    )


def span_masks(facts: DecoderFacts) -> list[Node]:
    """Return the mask of each merge and each deepstack add."""
    return [entry.mask for entry in _entries(facts)]


def _entries(facts: DecoderFacts) -> list[Merge | Deepstack]:
    return [*facts.merges, *facts.deepstack]


def merge_marks(captured: Captured) -> MergeMarks | None:
    """Return the marks of a graph with a merge; None if it has attention or does not return the merge."""
    found = find_lone_merge(captured.graph_module.graph)
    if found is None:
        return None
    return MergeMarks(MergeSpec(found.output_index), extract(captured.graph_module, found.masks))
