"""Bidirectional ranges of a prompt: tokens that attend to later tokens, beyond their own media span.

Models with a *prefix-LM* mask, such as PaliGemma (arXiv 2407.07726), let the picture attend to the question::

    <image> <image> <image>  what is this ?      tokens 0 to 6 attend to each other
    └──────────── range ────────────────┘

Rows of such tokens depend on the whole range, so it is one block: reused only where all of it and all before
it are equal, and then exactly. Where no token attends beyond its span, a prompt has no range.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.requests.mask_view import last_seen
from vlcache_fx.runtime.requests.media_spans import MediaSpan


@dataclass(frozen=True)
class Range:
    """Consecutive tokens that attend to no token after the last of them.

    Attributes:
        start, end: the tokens, ``end`` excluded.
    """

    start: int
    end: int

    def covers(self, span: Span) -> bool:
        """Return whether a span lies in the range."""
        return self.start <= span.start and span.end <= self.end


def bidirectional_ranges(reach: Tensor, spans: Sequence[Span]) -> tuple[Range, ...]:
    """Return the least ranges that hold all spans with a token that attends beyond its span, in order.

    No token before a range attends into it, and no token of a range attends beyond it. A span that overlaps a
    range lies in it.

    Args:
        reach: the last token that each token attends to in any layer, int64 [tokens] on the CPU.
        spans: spans of the prompt, in order.
    """
    found: list[Range] = []
    for span in spans:
        if int(reach[span.start : span.end].max()) < span.end or any(own.covers(span) for own in found):
            continue
        grown = _grown(Range(span.start, span.end), reach, spans)
        found = [own for own in found if own.end <= grown.start] + [grown]
    return tuple(found)


def _grown(own: Range, reach: Tensor, spans: Sequence[Span]) -> Range:
    while True:
        start, end = own.start, max(own.end, 1 + int(reach[own.start : own.end].max()))
        ahead = (reach[:start] >= start).nonzero()
        start = int(ahead[0]) if len(ahead) else start
        for span in spans:
            if span.start < end and start < span.end:
                start, end = min(start, span.start), max(end, span.end)
        if (start, end) == (own.start, own.end):
            return own
        own = Range(start, end)


def with_whole_media(ranges: Sequence[Range], media_spans: Sequence[MediaSpan]) -> tuple[Range, ...]:
    """Return the ranges, widened so that no media span lies partly in a range.

    Media too short to be spans do not enter ``bidirectional_ranges``. Their tokens attend to no later one.
    """
    found: list[Range] = []
    for own in ranges:
        media = [(one.start, one.start + one.length) for one in media_spans]
        overlapping = [(start, end) for start, end in media if start < own.end and own.start < end]
        start = min([own.start, *(start for start, _ in overlapping)])
        end = max([own.end, *(end for _, end in overlapping)])
        if found and start < found[-1].end:
            start = found.pop().start
        found.append(Range(start, end))
    return tuple(found)


def last_attended(seen: Tensor) -> Tensor:
    """Return the last token to which each token attends, at least itself, int64 [tokens] on the CPU.

    Args:
        seen: bool [..., tokens, tokens] on the CPU, True where the row's token attends to the column's.
    """
    num_tokens = seen.shape[-1]
    seen, last = seen.reshape(-1, num_tokens, num_tokens), torch.arange(num_tokens)
    ahead = seen.any(0).triu(1).any(-1)
    last[ahead] = last_seen(seen[:, ahead])  # of few tokens, mostly of none: masks are large
    return last
