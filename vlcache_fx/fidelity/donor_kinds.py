"""Donors that combine several contexts of one item.

``entries`` are exact donors of the item, one per context: each slot has a tensor of position-free keys or of
values; one of its dimensions has the item's ``length`` rows. They are not modified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlcache_fx.runtime.donors.refine import refined
from vlcache_fx.spec.differences import RIDGE
from vlcache_fx.spec.slots import Key, StoredSlot, Value
from vlcache_fx.store.entry import Entry
from vlcache_fx.testing.donors import rows_dim


def mean(entries: Sequence[Entry]) -> Entry:
    """Return the donor that is refined in these contexts, in order."""
    donor, *others = entries
    for other in others:
        better = refined(donor, other.tensors, str(other.info["before"]))
        assert better is not None  # without differences, each context counts
        donor = better
    return donor


def nearest(prompts: Sequence[str], new: str) -> int:
    """Return the index of the prompt with the largest word overlap with ``new`` (Jaccard)."""
    words = set(new.split())

    def similarity(prompt: str) -> float:
        own = set(prompt.split())
        return len(own & words) / max(1, len(own | words))

    return max(range(len(prompts)), key=lambda index: similarity(prompts[index]))


def fitted(entries: Sequence[Entry], exact: Entry, rows: int, ridge: float = RIDGE) -> Entry:
    """Per slot, compute the weighted mean of contexts closest to ``exact`` in the first ``rows`` rows.

    A warm call that recomputes these rows could do this: they show how its context differs from the stored
    ones, and the low-rank difference corrects the other rows. Weights sum to 1 and may be negative.

    Args:
        entries: the contexts.
        exact: the item's rows in the new context.
        rows: number of rows that are known.
        ridge: regularisation, as a multiple of the mean square of the contexts' differences.
    """

    first = torch.arange(rows)

    def fit(contexts: Tensor, wanted: Tensor) -> Tensor:
        return blend(contexts, first, wanted[first], ridge)

    return _combine(entries, exact, fit)


def blend(contexts: Tensor, rows: Tensor, exact: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return the combination of contexts that is closest to exact rows; see ``fitted``.

    Args:
        contexts: [contexts, n, ...].
        rows: which rows are known, int64 [R].
        exact: those rows, [R, ...].
        ridge: see ``fitted``.
    """
    middle = contexts.mean(0)
    parts = contexts - middle
    sample = parts[:, rows].flatten(1).double()
    gram = sample @ sample.T
    added = ridge * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    wanted = (exact - middle[rows]).flatten().double()
    weights = torch.linalg.solve(gram + added, sample @ wanted).to(parts.dtype)
    blended: Tensor = middle + torch.tensordot(weights, parts, 1)
    return blended


def cut(parts: Tensor, rank: int) -> Tensor:
    """Return the best approximation of this rank of each matrix ``[..., length, width]``."""
    left, sizes, right = torch.linalg.svd(parts, full_matrices=False)
    nearest_parts: Tensor = left[..., :rank] * sizes[..., None, :rank] @ right[..., :rank, :]
    return nearest_parts


def patched(entries: Sequence[Entry], exact: Entry, rank: int) -> Entry:
    """Per slot, compute the mean of the contexts plus the best correction of ``rank`` towards ``exact``.

    The correction of Kamera (arXiv 2606.23581), computed from the new context: the limit of a patch of this
    rank, not a method for calls.
    """

    def patch(contexts: Tensor, wanted: Tensor) -> Tensor:
        middle = contexts.mean(0)
        return middle + cut(wanted - middle, rank)

    return _combine(entries, exact, patch)


def _combine(entries: Sequence[Entry], exact: Entry, make: Callable[[Tensor, Tensor], Tensor]) -> Entry:
    """Apply ``make`` to each slot's rows: contexts ``[contexts, length, width]``, exact ``[length, width]``.

    States and maps of recurrent layers have no rows; they become their mean.
    """
    middle = mean(entries)
    made = {}
    for name, tensor in entries[0].tensors.items():
        if not isinstance(StoredSlot.parse(name), Key | Value):
            made[name] = middle.tensors[name]
            continue
        dim = rows_dim(tensor, exact)
        wide = [entry.tensors[name].double().movedim(dim, 0) for entry in (*entries, exact)]
        *contexts, wanted = (rows.flatten(1) for rows in wide)
        rows = make(torch.stack(contexts), wanted).view(wide[0].shape)
        made[name] = rows.movedim(0, dim).to(tensor.dtype)
    return Entry(made, middle.info)
