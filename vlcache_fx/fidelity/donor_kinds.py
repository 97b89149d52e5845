"""Donors made of several contexts of one item.

``entries`` are what was computed of the item exactly, one per context: per slot a tensor of position-free
keys or of values, one dimension of which runs over the item's ``length`` rows. None is written to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from vlcache_fx.errors import StoreError
from vlcache_fx.runtime.donors.refine import refined
from vlcache_fx.runtime.donors.tables import length_of
from vlcache_fx.store.entry import Entry

RIDGE = 0.01
"""How much a fit is drawn to the mean, as a share of the mean square of what contexts differ by."""


def mean(entries: Sequence[Entry]) -> Entry:
    """What a donor refines to when its item is computed in these contexts, one after the other."""
    first, *others = entries
    return reduce(
        lambda donor, other: refined(donor, other.tensors, str(other.info["before"])), others, first
    )


def nearest(prompts: Sequence[str], new: str) -> int:
    """Index of the prompt with the largest share of words in common with the ``new`` prompt (Jaccard)."""
    words = set(new.split())

    def likeness(prompt: str) -> float:
        own = set(prompt.split())
        return len(own & words) / max(1, len(own | words))

    return max(range(len(prompts)), key=lambda index: likeness(prompts[index]))


def fitted(entries: Sequence[Entry], exact: Entry, rows: int) -> Entry:
    """Per slot, the weighted mean of the contexts that is closest to ``exact`` in its first ``rows`` rows.

    That is what a warm call could do that recomputes these rows anyway: they show how its context differs
    from those that are kept, and the low-rank difference is applied to all other rows. Weights add up to one
    and may be negative.
    """

    def fit(contexts: Tensor, wanted: Tensor) -> Tensor:
        middle = contexts.mean(0)
        parts = contexts - middle
        seen = parts[:, :rows].flatten(1)
        gram = seen @ seen.T
        ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(len(gram), dtype=gram.dtype)
        weights = torch.linalg.solve(gram + ridge, seen @ (wanted - middle)[:rows].flatten())
        blended: Tensor = middle + torch.tensordot(weights, parts, 1)
        return blended

    return _made(entries, exact, fit)


def patched(entries: Sequence[Entry], exact: Entry, rank: int) -> Entry:
    """Per slot, the mean of the contexts and the best correction of ``rank`` that brings it to ``exact``.

    The correction of Kamera (arXiv 2606.23581), taken from the new context itself: how far a patch of this
    rank can go, not what a call could know beforehand.
    """

    def patch(contexts: Tensor, wanted: Tensor) -> Tensor:
        middle = contexts.mean(0)
        left, sizes, right = torch.linalg.svd(wanted - middle, full_matrices=False)
        corrected: Tensor = middle + left[:, :rank] * sizes[:rank] @ right[:rank]
        return corrected

    return _made(entries, exact, patch)


def _made(entries: Sequence[Entry], exact: Entry, make: Callable[[Tensor, Tensor], Tensor]) -> Entry:
    """A donor whose slots are made of all contexts' rows ``[contexts, length, width]`` and the exact ones."""
    made = {}
    for name, tensor in entries[0].tensors.items():
        dim = _rows_dim(tensor, exact)
        wide = [entry.tensors[name].double().movedim(dim, 0) for entry in (*entries, exact)]
        *contexts, wanted = (rows.flatten(1) for rows in wide)
        rows = make(torch.stack(contexts), wanted).view(wide[0].shape)
        made[name] = rows.movedim(0, dim).to(tensor.dtype)
    return Entry(made, mean(entries).info)


def _rows_dim(tensor: Tensor, donor: Entry) -> int:
    length = length_of(donor)
    dims = [dim for dim, size in enumerate(tensor.shape) if size == length]
    if len(dims) != 1:
        raise StoreError(
            f"rows of a donor of shape {list(tensor.shape)} and length {length}: {len(dims)} dimensions"
        )
    return dims[0]
