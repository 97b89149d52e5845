"""Donors of several contexts, made from donors of one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlcache_fx.errors import StoreError
from vlcache_fx.runtime.donors.donor_dtype import length_of, slots_of
from vlcache_fx.runtime.donors.refine import refined
from vlcache_fx.runtime.donors.subspace import Differences
from vlcache_fx.spec.decoder import RowSpec
from vlcache_fx.spec.slots import Key, StoredSlot, Value
from vlcache_fx.store.entry import Entry


def with_differences(entries: Sequence[Entry], rank: int, contexts: int | None = None) -> Entry:
    """Return the donor that keeps the differences of these contexts, see ``runtime.donors.subspace``.

    Args:
        entries: the contexts; the first may be a donor of several.
        rank: the option ``donor_rank``.
        contexts: the option ``donor_contexts``; by default the number of entries.
    """
    donor, *others = entries
    specs: dict[StoredSlot, RowSpec] = {}
    for name in slots_of(donor):
        slot, tensor = StoredSlot.parse(name), donor.tensors[name]
        if isinstance(slot, Key | Value):
            dtype = str(tensor.dtype).removeprefix("torch.")
            specs[slot] = RowSpec(rows_dim(tensor, donor), dtype, tuple(tensor.shape))
    differences = Differences.of(rank, contexts or len(entries), specs)
    for other in others:
        better = refined(donor, other.tensors, str(other.info["before"]), differences=differences)
        donor = better or donor
    return donor


def rows_dim(tensor: Tensor, donor: Entry) -> int:
    """Return the dimension of a tensor of a donor that has its rows.

    Raises:
        StoreError: none or several have their number.
    """
    length = length_of(donor)
    dims = [dim for dim, size in enumerate(tensor.shape) if size == length]
    if len(dims) != 1:
        raise StoreError(
            f"rows of a donor of shape {list(tensor.shape)} and length {length}: {len(dims)} dimensions"
        )
    return dims[0]
