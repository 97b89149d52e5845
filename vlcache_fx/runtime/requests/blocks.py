"""Exact reuse of a prompt's beginning: rows behind an identical prefix need no recompute.

A causal decoder computes a row from the rows up to it, so where everything before a row is what it was in an
earlier request, stored keys and values are what computing would give. A prompt is cut into pieces, blocks of
text and whole media items, and each piece is known by everything in front of it (the chained hashes of
PagedAttention's prefix caches, arXiv 2309.06180).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vlcache_fx.keys.digest import Part, content_digest, tensor_bytes
from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.requests.media_spans import MediaSpan

BLOCK_TOKENS = 16
"""Text is stored in blocks of this length; the end of a text is a shorter one. A prompt that leaves the known
path inside a block computes the whole block."""


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens that are stored together.

    Attributes:
        start, length: the tokens.
        key: of the stored rows.
        before: digest of everything in front of the piece.
        span: the media item that fills it; None for text, whose key holds ``before``.
    """

    start: int
    length: int
    key: str
    before: str
    span: Span | None = None

    @property
    def end(self) -> int:
        """One past the last token."""
        return self.start + self.length


@dataclass(frozen=True)
class PrefixReader:
    """Cuts the prompts of one decoder graph into pieces.

    Attributes:
        embeddings: index of the input whose rows may be marked as spans; their keys stand for these rows.
    """

    embeddings: int | None = None

    def pieces(
        self,
        args: Sequence[Any],
        by_token: Sequence[Tensor],
        media_spans: Sequence[MediaSpan],
        spans: Sequence[Span],
        num_tokens: int,
        root: str,
        seen: Sequence[bytes] | None = None,
        sample: int = 0,
    ) -> Iterator[Piece]:
        """The pieces of one prompt, in order.

        Args:
            args: the graph's inputs.
            by_token: the values that rows depend on, each [tokens, ...] on the CPU.
            media_spans: all media spans, sorted; also those too short to be reused.
            spans: the spans among them.
            num_tokens: length of the prompt.
            root: what else rows depend on: computation, weights, global state, salt.
            seen: per token, a digest of what masks let it see; None where that is every token before it.
            sample: of the prompt.
        """
        before = content_digest(["prefix", root])
        readers = [_reader(value) for value in by_token]
        if seen is not None:
            readers.append(lambda start, end: list(seen[start:end]))
        by_start = {span.start: span for span in spans}
        cuts = list(_cuts(media_spans, num_tokens))
        embedded = self._embedded_text(args, sample, cuts)
        for start, length, media_span in cuts:
            span = by_start.get(start)
            parts: list[Part] = [read(start, start + length) for read in readers]
            parts += embedded.get(start, ())
            if media_span is not None:
                parts.append(media_span.digests if span is None else span.key)
            after = content_digest(["piece", before, length, *parts])
            yield Piece(start, length, after if span is None else span.key, before, span)
            before = after

    def _embedded_text(
        self, args: Sequence[Any], sample: int, cuts: Sequence["Cut"]
    ) -> dict[int, tuple[Tensor]]:
        """Per start of a block of text, its rows of the embeddings, on the CPU: brought there all at once."""
        text = [(start, length) for start, length, media_span in cuts if media_span is None]
        if self.embeddings is None or not text:
            return {}
        embeds = args[self.embeddings].detach()[sample : sample + 1]
        rows = torch.cat([embeds.narrow(1, *block) for block in text], 1).cpu()
        parts = torch.split(rows, [length for _, length in text], 1)
        return {start: (part,) for (start, _), part in zip(text, parts, strict=True)}


Cut: TypeAlias = tuple[int, int, MediaSpan | None]
"""Start and length of a piece, and its media span; None for text."""


def _cuts(media_spans: Sequence[MediaSpan], num_tokens: int) -> Iterator[Cut]:
    """Each media span whole, the text between them in blocks."""
    at = 0
    for start, media_span in [
        *((media_span.start, media_span) for media_span in media_spans),
        (num_tokens, None),
    ]:
        for first in range(at, start, BLOCK_TOKENS):
            yield first, min(BLOCK_TOKENS, start - first), None
        if media_span is not None:
            yield start, media_span.length, media_span
            at = start + media_span.length


def _reader(rows: Tensor) -> Callable[[int, int], Part]:
    """What tells a range of rows from others: dtype, sizes and bytes.

    Slicing bytes, rather than tensors: a prompt has many pieces.
    """
    form = (str(rows.dtype), tuple(rows.shape[1:]))
    data, size = tensor_bytes(rows), rows.nbytes // rows.shape[0]
    return lambda start, end: (form, bytes(data[start * size : end * size]))
