"""Runs of tokens that an encoder's features fill, and the rows that fill them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, zip_longest

import torch
from torch import Tensor

from vlcache_fx.keys.digest_cache import NO_DIGESTS, RowRange, digest_rows
from vlcache_fx.plan.types import Grid


@dataclass(frozen=True)
class MediaItems:
    """Media items of one modality that were encoded for a call, in order.

    Attributes:
        lengths: rows of features of each item.
        grids: of each item, None where it is not known; empty where none is.
    """

    lengths: tuple[int, ...] = ()
    grids: tuple[Grid | None, ...] = ()

    @classmethod
    def of_patches(cls, lengths: Sequence[int], patches: Sequence[Sequence[int]]) -> "MediaItems":
        """Items whose encoder merges squares of patches into a row.

        Args:
            lengths: rows of features of each item.
            patches: per item, patches in time, height and width; empty where they are not known.
        """
        if len(patches) != len(lengths):
            return cls(tuple(lengths))
        grids = [merged_grid(grid, length) for grid, length in zip(patches, lengths, strict=True)]
        return cls(tuple(lengths), tuple(grids))

    @property
    def grid_of_rows(self) -> dict[tuple[int, int], Grid]:
        """Grids by the rows ``(start, end)`` of all items' features."""
        bounds = pairwise(accumulate(self.lengths, initial=0))
        return {rows: grid for rows, grid in zip(bounds, self.grids, strict=False) if grid is not None}


NO_ITEMS = MediaItems()


def merged_grid(patches: Sequence[int], length: int) -> Grid | None:
    """The grid of ``length`` tokens, each of a square of patches; None where no square fits."""
    if len(patches) != 3 or length < 1:
        return None
    time, height, width = patches
    side = math.isqrt(time * height * width // length)
    if not side or height % side or width % side:
        return None
    grid = (time, height // side, width // side)
    return grid if math.prod(grid) == length else None


@dataclass(frozen=True)
class Run:
    """A run of consecutive tokens that one merge fills.

    Attributes:
        sample: where it is.
        start, length: the tokens, from the beginning of the sample.
        content: feature rows of these tokens: those merged, and any added in later layers.
        known: digests of ``content``; None, or missing, for what has not been read.
        grid: of the media item, where it is known and the run is the whole item.
    """

    sample: int
    start: int
    length: int
    content: tuple[Tensor, ...]
    known: tuple[str | None, ...] = ()
    grid: Grid | None = None

    @property
    def digests(self) -> tuple[str, ...]:
        """Of ``content``: dtype, shape and values of each."""
        pairs = zip_longest(self.content, self.known)
        return tuple(
            digest_rows(rows, [(0, len(rows))])[0] if known is None else known for rows, known in pairs
        )

    @property
    def end(self) -> int:
        """One past the last token."""
        return self.start + self.length


def token_flags(mask: Tensor) -> Tensor:
    """The mask of a merge token by token, bool [samples, tokens]; its own form may spell out the width."""
    flags = mask[..., 0] if mask.dim() > 2 else mask
    return flags.reshape(-1, flags.shape[-1])


def flagged_places(flags: Tensor) -> Tensor:
    """Places of the flagged tokens over all samples, int64, sorted, on the CPU."""
    return flags.flatten().nonzero().flatten().cpu()


def runs_of(
    places: Tensor,
    features: Tensor,
    num_tokens: int,
    items: MediaItems = NO_ITEMS,
    known: Mapping[RowRange, str] = NO_DIGESTS,
) -> list[Run]:
    """The runs of consecutive ``places`` (sorted, int64, over all samples), with their rows of ``features``.

    An item lies in one sample, so no run continues in the next sample; where ``items`` are known, none
    continues after the end of an item. Digests of rows may be ``known``.
    """
    if not len(places):
        return []
    ends = (places.diff() != 1) | (places[1:] % num_tokens == 0)
    cuts = [cut for cut in accumulate(items.lengths) if 0 < cut < len(places)]
    ends[torch.tensor(cuts, dtype=torch.int64) - 1] = True
    grids = items.grid_of_rows
    firsts = [0, *(ends.nonzero().flatten() + 1).tolist(), len(places)]
    return [
        Run(
            *divmod(int(places[first]), num_tokens),
            after - first,
            (features[first:after],),
            (known.get((first, after)),),
            grids.get((first, after)),
        )
        for first, after in pairwise(firsts)
    ]


def with_additions(
    runs: list[Run], places: Tensor, features: Tensor, num_tokens: int, known: Mapping[RowRange, str]
) -> list[Run] | None:
    """The runs with the rows that are added at their tokens; None where some are added at other tokens."""
    starts = [run.sample * num_tokens + run.start for run in runs]
    bounds = torch.tensor(
        [(start, start + run.length) for start, run in zip(starts, runs, strict=True)], dtype=torch.int64
    )
    cuts = torch.searchsorted(places, bounds.reshape(-1, 2)).tolist()
    if sum(after - first for first, after in cuts) != len(places):
        return None
    return [
        replace(
            run,
            content=(*run.content, features[first:after]),
            known=(*run.known, known.get((first, after))),
        )
        for run, (first, after) in zip(runs, cuts, strict=True)
    ]
