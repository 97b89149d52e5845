"""Blocks of a prompt, for exact reuse of its prefix.

A causal decoder computes a row from the rows up to it. After an identical prefix, stored keys and values
equal recomputed ones. A prompt is split into blocks: up to 16 tokens of text, or a whole media span. The key
of a block of text covers all blocks before it (the chained hashes of PagedAttention, arXiv 2309.06180)::

    text[0:16]  text[16:23]  <image>[23:279]  text[279:290]

A bidirectional range (see ``bidirectional``) is one block, with the text and the media in it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlcache_fx.keys.digest import Part, content_digest, tensor_bytes
from vlcache_fx.keys.entry_key import NO_PARTS, KeyScope
from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.requests.bidirectional import Range
from vlcache_fx.runtime.requests.media_spans import MediaSpan

if TYPE_CHECKING:
    from vlcache_fx.runtime.requests.request import Request, Sample

BLOCK_TOKENS = 16
"""Tokens of a block of text; the last one of a text may be shorter. A prompt that differs inside a block
computes the whole block."""


@dataclass(frozen=True)
class Block:
    """Consecutive tokens that are stored together.

    Attributes:
        start, length: the tokens.
        key: key of the stored rows; that of a span does not cover ``before``.
        before: digest of all blocks before this one.
        span: the span that fills the block; None for text, for media too short to be a span, and for
            bidirectional ranges.
        notes: what explains the features of a span, see ``MediaSpan``.
    """

    start: int
    length: int
    key: str
    before: str
    span: Span | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """One past the last token."""
        return self.start + self.length


@dataclass(frozen=True)
class BlockSplitter:
    """Splits the prompts of one decoder graph into blocks.

    Attributes:
        embeddings: index of the input embeddings in which spans may be marked; None where graphs merge. Their
            rows count in blocks of text; in spans, the span's key stands for them.
    """

    embeddings: int | None = None

    def blocks(
        self,
        args: Sequence[Any],
        by_token: Sequence[Tensor],
        media_spans: Sequence[MediaSpan],
        spans: Sequence[Span],
        num_tokens: int,
        root: str,
        scope: KeyScope,
        seen: Sequence[bytes] | None = None,
        sample: int = 0,
        ranges: Sequence[Range] = (),
    ) -> Iterator[Block]:
        """Yield the blocks of one prompt, in order.

        Args:
            args: the graph's inputs.
            by_token: values on which rows depend, each [tokens, ...] on the CPU.
            media_spans: all media spans, sorted; also those too short to be reused.
            spans: those that may be reused, with keys.
            num_tokens: length of the prompt.
            root: digest of all else on which rows depend: computation, weights, global state, salt.
            scope: tenant and model.
            seen: per token, a digest of the tokens that masks show to it; None where causal.
            sample: index of the prompt in the batch.
            ranges: bidirectional ranges of the prompt, in order.
        """
        before = content_digest(["prefix", root])
        readers = [_reader(value) for value in by_token]
        if seen is not None:
            readers.append(lambda start, end: list(seen[start:end]))
        by_start = {span.start: span for span in spans}
        keys = {span.key: span.key for span in spans}  # the spans of a range have its key, with parts
        cuts = list(_cuts(media_spans, num_tokens, ranges))
        embedded = self._embedded_text(args, sample, cuts)
        for cut in cuts:
            span = by_start.get(cut.start) if cut.is_span else None
            parts: list[Part] = [read(cut.start, cut.start + cut.length) for read in readers]
            parts += embedded.get(cut.start, ())
            if span is not None:
                parts.append(span.key)
            else:
                parts += [media_span.digests for media_span in cut.media_spans]
            after = content_digest(["piece", before, cut.length, *parts])
            text = scope.with_digest("text", after)
            key = keys.get(text, text) if span is None else span.key
            notes = cut.media_spans[0].notes if cut.is_span else NO_PARTS
            yield Block(cut.start, cut.length, key, before, span, notes)
            before = after

    def of_sample(self, request: "Request", sample: "Sample") -> Iterable[Block]:
        """Return the blocks of a sample of a request with keys; of a batch, those of its spans alone."""
        blocks = self.blocks(
            request.args,
            sample.by_token,
            sample.media_spans,
            sample.spans,
            request.num_tokens,
            sample.root,
            request.scope,
            sample.seen,
            sample.index,
            sample.bidirectional,
        )
        if len(request.samples) == 1:
            return blocks
        # The context of an item after padding differs from that after the same text alone.
        return [
            replace(block, before=content_digest(["batch", block.before]))
            for block in blocks
            if block.span is not None
        ]

    def _embedded_text(
        self, args: Sequence[Any], sample: int, cuts: Sequence["Cut"]
    ) -> dict[int, tuple[Tensor]]:
        """Return the embeddings of each block of text by its start, on the CPU: one copy for all of them."""
        text = [(cut.start, cut.length) for cut in cuts if not cut.is_span]
        if self.embeddings is None or not text:
            return {}
        embeds = args[self.embeddings].detach()[sample : sample + 1]
        rows = torch.cat([embeds.narrow(1, *block) for block in text], 1).cpu()
        parts = torch.split(rows, [length for _, length in text], 1)
        return {start: (part,) for (start, _), part in zip(text, parts, strict=True)}


@dataclass(frozen=True)
class Cut:
    """Tokens of a block, and the media in them.

    Attributes:
        start, length: the tokens.
        media_spans: the media in them.
        is_span: one media span fills the block, and is no part of a bidirectional range.
    """

    start: int
    length: int
    media_spans: tuple[MediaSpan, ...] = ()
    is_span: bool = False


def _cuts(media_spans: Sequence[MediaSpan], num_tokens: int, ranges: Sequence[Range]) -> Iterator[Cut]:
    """Each bidirectional range whole, each media span outside of them whole, the text between in blocks."""
    whole = [Cut(own.start, own.end - own.start, _inside(media_spans, own)) for own in ranges]
    in_ranges = [media_span for cut in whole for media_span in cut.media_spans]
    whole += [
        Cut(one.start, one.length, (one,), is_span=True)
        for one in media_spans
        if not any(one is other for other in in_ranges)
    ]
    at = 0
    for cut in [*sorted(whole, key=lambda cut: cut.start), Cut(num_tokens, 0)]:
        for first in range(at, cut.start, BLOCK_TOKENS):
            yield Cut(first, min(BLOCK_TOKENS, cut.start - first))
        if cut.length:
            yield cut
        at = cut.start + cut.length


def _inside(media_spans: Sequence[MediaSpan], own: Range) -> tuple[MediaSpan, ...]:
    return tuple(one for one in media_spans if own.start <= one.start < own.end)


def _reader(rows: Tensor) -> Callable[[int, int], Part]:
    """Return a function from a range of rows to their dtype, sizes and bytes.

    It slices bytes, which is faster than slicing tensors: a prompt has many blocks.
    """
    metadata = (str(rows.dtype), tuple(rows.shape[1:]))
    data, size = tensor_bytes(rows), rows.nbytes // rows.shape[0]
    return lambda start, end: (metadata, bytes(data[start * size : end * size]))
