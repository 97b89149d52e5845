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

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.analysis.dataflow import ancestors
from vlcache_fx.capture import Captured
from vlcache_fx.capture.captured import InputKind
from vlcache_fx.capture.subgraph import needed_for
from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.runs import Run
from vlcache_fx.store.keys import Part, content_digest, tensor_bytes

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
        inputs: indices of the inputs that keys and values depend on, beside merged features and weights.
        sizes: indices of inputs that are numbers; what is the size of a tensor as well says nothing more.
        embeddings: index of the input whose rows may be marked as spans; their keys stand for these rows.
    """

    inputs: tuple[int, ...]
    sizes: tuple[int, ...]
    embeddings: int | None = None

    @classmethod
    def of(
        cls,
        captured: Captured,
        facts: DecoderFacts,
        features: Sequence[int],
        embeddings: int | None = None,
    ) -> "PrefixReader":
        """Build it for a captured graph; ``features`` are the inputs that spans' contents stand for."""
        frontiers = [site for layer in facts.layers for site in (layer.site.key, layer.site.value)]
        # A cache whose earlier keys rows depend on has no known prefix; others say nothing about them.
        graph = captured.graph_module.graph
        nodes = {node: None for node in graph.nodes if node not in facts.past}
        reached = ancestors([*frontiers, facts.stream.boundaries[-1]], nodes)
        wanted = [
            index
            for index, (node, kind) in enumerate(zip(captured.placeholders, captured.kinds, strict=True))
            if kind is InputKind.DATA and node in reached and index not in (*features, embeddings)
        ]
        # Numbers that say what results are made of (how many of the last tokens) are none of the rows'.
        needed = needed_for([*frontiers, facts.stream.boundaries[-1]])
        sizes = [i for i in captured.indices_of(InputKind.SIZE) if captured.placeholders[i] in needed]
        return cls(tuple(wanted), tuple(sizes), embeddings)

    def pieces(
        self, args: Sequence[Any], runs: Sequence[Run], spans: Sequence[Span], num_tokens: int, root: str
    ) -> Iterator[Piece]:
        """The pieces of one prompt, in order.

        Args:
            args: the graph's inputs.
            runs: everything that merges fill, sorted; those too short to be spans included.
            spans: the spans among them.
            num_tokens: length of the prompt.
            root: what else rows depend on: weights, arithmetic, salt.
        """
        values = [args[index].detach().cpu() for index in self.inputs]
        by_token = [_token_dims(value, num_tokens) for value in values]
        whole = [value for value, dims in zip(values, by_token, strict=True) if not dims]
        known = {size for value in args if isinstance(value, Tensor) for size in value.shape}
        numbers = [args[index] for index in self.sizes if args[index] not in known]
        before = content_digest(["prefix", root, tuple(whole), tuple(numbers)])
        readers = [_reader(value, dims) for value, dims in zip(values, by_token, strict=True) if dims]
        by_start = {span.start: span for span in spans}
        cuts = list(_cuts(runs, num_tokens))
        embedded = self._embedded_text(args, cuts)
        for start, length, run in cuts:
            span = by_start.get(start)
            parts: list[Part] = [read(start, start + length) for read in readers]
            parts += embedded.get(start, ())
            if run is not None:
                parts.append(run.digests if span is None else span.key)
            after = content_digest(["piece", before, length, *parts])
            yield Piece(start, length, after if span is None else span.key, before, span)
            before = after

    def _embedded_text(self, args: Sequence[Any], cuts: Sequence["Cut"]) -> dict[int, tuple[Tensor]]:
        """Per start of a block of text, its rows of the embeddings, on the CPU: brought there all at once."""
        text = [(start, length) for start, length, run in cuts if run is None]
        if self.embeddings is None or not text:
            return {}
        embeds = args[self.embeddings].detach()
        rows = torch.cat([embeds.narrow(1, *block) for block in text], 1).cpu()
        parts = torch.split(rows, [length for _, length in text], 1)
        return {start: (part,) for (start, _), part in zip(text, parts, strict=True)}


Cut: TypeAlias = tuple[int, int, Run | None]
"""Where a piece starts, how long it is, and the run that fills it; None for text."""


def _cuts(runs: Sequence[Run], num_tokens: int) -> Iterator[Cut]:
    """Each run whole, the text between them in blocks."""
    at = 0
    for start, run in [*((run.start, run) for run in runs), (num_tokens, None)]:
        for first in range(at, start, BLOCK_TOKENS):
            yield first, min(BLOCK_TOKENS, start - first), None
        if run is not None:
            yield start, run.length, run
            at = start + run.length


def _token_dims(value: Tensor, num_tokens: int) -> tuple[int, ...]:
    """The dimension over tokens, the two of a mask over pairs of tokens, or none where it is not clear."""
    dims = tuple(dim for dim, size in enumerate(value.shape) if size == num_tokens)
    pairs = (value.dim() - 2, value.dim() - 1)
    return dims if len(dims) == 1 or dims == pairs else ()


def _reader(value: Tensor, dims: tuple[int, ...]) -> Callable[[int, int], Part]:
    """What tells a range of tokens of ``value`` from others: dtype, sizes and bytes of its rows.

    Slicing bytes, rather than tensors: a prompt has many pieces.
    """
    if len(dims) > 1:
        return lambda start, end: value.narrow(dims[0], start, end - start).narrow(dims[1], 0, end)
    rows = value.movedim(dims[0], 0)
    form = (str(value.dtype), dims[0], tuple(rows.shape[1:]))
    data, size = tensor_bytes(rows), value.nbytes // rows.shape[0]
    return lambda start, end: (form, bytes(data[start * size : end * size]))
