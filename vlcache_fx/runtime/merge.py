"""Serves graphs with a merge and no decoder: some models break the graph between the two."""

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
    """Marks media spans in the merged embeddings, for the decoder's graph.

    Attributes:
        spec: spec of the graph.
        spans: the program that returns the mask of each merge.
    """

    spec: MergeSpec
    spans: Values

    def mark(self, args: Sequence[Any], results: Sequence[Any]) -> Sequence[Any]:
        """Mark the ``results`` of a call with ``args``, and return them."""
        embeds, spans = results[self.spec.output], []
        for mask in self.spans(*args):
            positions = flagged_positions(token_flags(mask))
            media_spans = media_spans_of(positions, embeds.flatten(0, 1)[positions], embeds.shape[1])
            spans += [(span.sample, span.start, span.length) for span in media_spans]
        with contextlib.suppress(PlanError):  # overlap: merges into the same tokens
            mark_spans(embeds, spans)
        return results
