"""Merges in a graph of their own: some models are cut between the merge and the decoder."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from vlcache_fx.analysis.decoder.merge import find_lone_merge
from vlcache_fx.errors import PlanError
from vlcache_fx.ir import Captured
from vlcache_fx.ir.subgraph import extract
from vlcache_fx.runtime.requests.marked_spans import mark_spans
from vlcache_fx.runtime.requests.media_spans import flagged_places, runs_of, token_flags


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
        found = find_lone_merge(captured.graph_module.graph)
        return None if found is None else cls(extract(captured.graph_module, found.masks), found.place)

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
