"""Merges in a graph of their own: some models are cut between the merge and the decoder."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx import Node

from vlcache_fx.analysis.axis import shape_of
from vlcache_fx.analysis.merge import MERGE_OPS
from vlcache_fx.analysis.other_attention import other_attention
from vlcache_fx.analysis.sites import find_sites
from vlcache_fx.capture import Captured
from vlcache_fx.capture.subgraph import extract, needed_for
from vlcache_fx.errors import PlanError
from vlcache_fx.runtime.marks import mark_spans
from vlcache_fx.runtime.runs import flagged_places, runs_of, token_flags


@dataclass(frozen=True)
class MergeMarks:
    """Marks what such a graph returns, so that the decoder's graph knows the spans.

    Attributes:
        masks: from the graph's inputs to the mask of each merge.
        place: where the merged embeddings, [batch, tokens, hidden], stand among the graph's results.
    """

    masks: fx.GraphModule
    place: int

    @classmethod
    def of(cls, captured: Captured) -> MergeMarks | None:
        """None for a graph that attends to anything, or returns no merge."""
        graph = captured.graph_module.graph
        results = graph.output_node().args[0]
        assert isinstance(results, tuple | list)
        merged = {
            index: node
            for index, node in enumerate(results)
            if isinstance(node, Node) and node.target in MERGE_OPS
        }
        if len(merged) != 1 or find_sites(graph) or next(other_attention(graph), None) is not None:
            return None
        ((place, last),) = merged.items()
        shape = shape_of(last)
        if len(shape) != 3:
            return None
        needed = needed_for([last])
        merges = [node for node in graph.nodes if node in needed and node.target in MERGE_OPS]
        return cls(extract(captured.graph_module, [node.args[1] for node in merges]), place)

    def mark(self, args: Sequence[Any], results: Sequence[Any]) -> Sequence[Any]:
        """``results`` of the call with ``args``, marked."""
        embeds, spans = results[self.place], []
        for mask in self.masks(*args):
            places = flagged_places(token_flags(mask))
            runs = runs_of(places, embeds.flatten(0, 1)[places], embeds.shape[1])
            spans += [(run.sample, run.start, run.length) for run in runs]
        with contextlib.suppress(PlanError):  # merges into the same tokens: no span is what one encoder gave
            mark_spans(embeds, spans)
        return results
