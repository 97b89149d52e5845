"""Merges in a graph of their own: some models are cut between the merge and the decoder."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlcache_fx.errors import PlanError
from vlcache_fx.runtime.requests.marked_spans import mark_spans
from vlcache_fx.runtime.requests.media_spans import flagged_positions, media_spans_of, token_flags
from vlcache_fx.runtime.requests.prologue import Values
from vlcache_fx.spec.program import MergeSpec


@dataclass(frozen=True)
class MergeMarks:
    """Marks what such a graph returns, so that the decoder's graph knows the spans.

    Attributes:
        spec: of the graph.
        spans: the program that gives the mask of each merge.
    """

    spec: MergeSpec
    spans: Values

    def mark(self, args: Sequence[Any], results: Sequence[Any]) -> Sequence[Any]:
        """``results`` of the call with ``args``, marked."""
        embeds, spans = results[self.spec.output], []
        for mask in self.spans(*args):
            positions = flagged_positions(token_flags(mask))
            media_spans = media_spans_of(positions, embeds.flatten(0, 1)[positions], embeds.shape[1])
            spans += [(span.sample, span.start, span.length) for span in media_spans]
        with contextlib.suppress(PlanError):  # merges into the same tokens: no span is what one encoder gave
            mark_spans(embeds, spans)
        return results
