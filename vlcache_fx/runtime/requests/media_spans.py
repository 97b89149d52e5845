"""Media spans: the tokens of a prompt that encoder features fill, and the feature rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise, zip_longest

import torch
from torch import Tensor

from vlcache_fx.keys.digest_cache import NO_DIGESTS, RowRange, digest_rows
from vlcache_fx.keys.entry_key import NO_PARTS
from vlcache_fx.plan.types import Grid


@dataclass(frozen=True)
class MediaItems:
    """Media items of one modality that were encoded for a call, in order.

    Attributes:
        lengths: feature rows of each item.
        grids: grid of each item, None where unknown; empty where all are unknown.
        notes: what explains each item's features, see ``MediaSpan``; empty where unknown.
    """

    lengths: tuple[int, ...] = ()
    grids: tuple[Grid | None, ...] = ()
    notes: tuple[Mapping[str, str], ...] = ()

    @classmethod
    def of_patches(cls, lengths: Sequence[int], patches: Sequence[Sequence[int]]) -> "MediaItems":
        """Return the items of an encoder that merges squares of patches into a row.

        Args:
            lengths: feature rows of each item.
            patches: per item, its patches in time, height and width; empty where unknown.
        """
        if len(patches) != len(lengths):
            return cls(tuple(lengths))
        grids = [merged_grid(grid, length) for grid, length in zip(patches, lengths, strict=True)]
        return cls(tuple(lengths), tuple(grids))

    def with_notes(self, parts: Sequence[Mapping[str, str]]) -> "MediaItems":
        """Return the items with the parts of their features' keys, if there is a mapping per item."""
        if len(parts) != len(self.lengths):
            return self
        notes = tuple(
            {f"{ENCODER}{name}": digest for name, digest in own.items() if name not in OF_ALL_KEYS}
            for own in parts
        )
        return replace(self, notes=notes)

    @property
    def notes_of_rows(self) -> dict[tuple[int, int], Mapping[str, str]]:
        """Notes by ``(start, end)``, an item's rows in the features of all items."""
        return dict(zip(pairwise(accumulate(self.lengths, initial=0)), self.notes, strict=False))

    @property
    def grid_of_rows(self) -> dict[tuple[int, int], Grid]:
        """Grids by ``(start, end)``, an item's rows in the features of all items."""
        bounds = pairwise(accumulate(self.lengths, initial=0))
        return {rows: grid for rows, grid in zip(bounds, self.grids, strict=False) if grid is not None}


NO_ITEMS = MediaItems()

ENCODER = "encoder."
"""Begins the names of notes: the rest names a part of the key of features."""

OF_ALL_KEYS = ("format", "salt")
"""Parts that the keys of features share with those of donors; not noted."""


def merged_grid(patches: Sequence[int], length: int) -> Grid | None:
    """Return the grid of ``length`` tokens, each a square of patches; None where no square fits."""
    if len(patches) != 3 or length < 1:
        return None
    time, height, width = patches
    side = math.isqrt(time * height * width // length)
    if not side or height % side or width % side:
        return None
    grid = (time, height // side, width // side)
    return grid if math.prod(grid) == length else None


@dataclass(frozen=True)
class MediaSpan:
    """Consecutive tokens that a merge fills with encoder features.

    Example: ``start=2, length=3`` in a prompt of 7 tokens::

        text text <image> <image> <image> text text

    Attributes:
        sample: index of the sample in the batch.
        start, length: the tokens, counted from the first of the sample.
        content: feature rows of these tokens, [length, width] each: the merged rows, then any deepstack rows.
        cached_digests: digests of ``content``, in its order; None or missing where a tensor was not read yet.
        grid: grid of the media item; None where it is unknown or the span is only a part of the item.
        notes: digests that explain where the features come from, by name, such as ``encoder.content`` for the
            pixels. Not part of any key.
    """

    sample: int
    start: int
    length: int
    content: tuple[Tensor, ...]
    cached_digests: tuple[str | None, ...] = ()
    grid: Grid | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def digests(self) -> tuple[str, ...]:
        """Digests of ``content``, each over dtype, shape and values."""
        pairs = zip_longest(self.content, self.cached_digests)
        return tuple(
            digest_rows(rows, [(0, len(rows))])[0] if cached is None else cached for rows, cached in pairs
        )

    def with_digests(self) -> "MediaSpan":
        """Return the span with all digests cached, so that later reads do not hash again."""
        return replace(self, cached_digests=self.digests)

    @property
    def end(self) -> int:
        """One past the last token."""
        return self.start + self.length


def token_flags(mask: Tensor) -> Tensor:
    """Return the mask of a merge per token, bool [samples, tokens]; graphs may repeat it over the width."""
    flags = mask[..., 0] if mask.dim() > 2 else mask
    return flags.reshape(-1, flags.shape[-1])


def flagged_positions(flags: Tensor) -> Tensor:
    """Return the positions of flagged tokens in the flattened batch, int64, sorted, on the CPU."""
    return flags.flatten().nonzero().flatten().cpu()


def media_spans_of(
    positions: Tensor,
    features: Tensor,
    num_tokens: int,
    items: MediaItems = NO_ITEMS,
    digests: Mapping[RowRange, str] = NO_DIGESTS,
) -> list[MediaSpan]:
    """Group consecutive positions into media spans, each with its rows of ``features``.

    A span ends at the end of its sample, and at the end of its item where ``items`` are given.

    Args:
        positions: media tokens in the flattened batch, int64, sorted.
        features: a row per position.
        num_tokens: tokens of each sample.
        items: the encoded items, in the order of their rows.
        digests: digests of ranges of ``features`` rows, as far as they are cached.
    """
    if not len(positions):
        return []
    ends = (positions.diff() != 1) | (positions[1:] % num_tokens == 0)
    cuts = [cut for cut in accumulate(items.lengths) if 0 < cut < len(positions)]
    ends[torch.tensor(cuts, dtype=torch.int64) - 1] = True
    grids, notes = items.grid_of_rows, items.notes_of_rows
    firsts = [0, *(ends.nonzero().flatten() + 1).tolist(), len(positions)]
    return [
        MediaSpan(
            *divmod(int(positions[first]), num_tokens),
            after - first,
            (features[first:after],),
            (digests.get((first, after)),),
            grids.get((first, after)),
            notes.get((first, after), NO_PARTS),
        )
        for first, after in pairwise(firsts)
    ]


def with_deepstack(
    media_spans: list[MediaSpan],
    positions: Tensor,
    features: Tensor,
    num_tokens: int,
    digests: Mapping[RowRange, str],
) -> list[MediaSpan] | None:
    """Return the media spans with deepstack ``features`` at ``positions``; None where they lie outside."""
    starts = [span.sample * num_tokens + span.start for span in media_spans]
    bounds = torch.tensor(
        [(start, start + span.length) for start, span in zip(starts, media_spans, strict=True)],
        dtype=torch.int64,
    )
    cuts = torch.searchsorted(positions, bounds.reshape(-1, 2)).tolist()
    if sum(after - first for first, after in cuts) != len(positions):
        return None
    return [
        replace(
            span,
            content=(*span.content, features[first:after]),
            cached_digests=(*span.cached_digests, digests.get((first, after))),
        )
        for span, (first, after) in zip(media_spans, cuts, strict=True)
    ]
