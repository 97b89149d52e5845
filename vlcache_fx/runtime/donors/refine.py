"""Refined donors: the mean of an item's rows over the contexts in which they were computed exactly.

The context of an item is all that precedes it. A donor of one context is exact there and approximate in all
others. The mean of several contexts is exact in none, but closer in most others.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vlcache_fx.keys.entry_key import NO_PARTS, parts_of
from vlcache_fx.runtime.donors.donor_dtype import Packing, dtype_of, is_packed, rows_of, slots_of
from vlcache_fx.runtime.donors.states import CUTS
from vlcache_fx.runtime.donors.subspace import Differences
from vlcache_fx.store.base import Store
from vlcache_fx.store.entry import Entry, Json
from vlcache_fx.store.eviction import with_cost


def contexts_of(entry: Entry) -> tuple[str, ...]:
    """Return the contexts in a donor's mean, as digests of the blocks before the item."""
    contexts = entry.info.get("contexts")
    return tuple(map(str, contexts)) if isinstance(contexts, list) else (str(entry.info.get("before")),)


def exact_key(key: str) -> str:
    """Return the key of an item's exact rows in its latest context, stored besides its refined donor.

    The key does not cover the context: a copy per context would evict donors of other items, for
    conversations that most likely never continue. So an item has at most two entries. The copy begins with
    the second context: until then the donor is exact.
    """
    return f"exact{key.removeprefix('donor')}"


def exact_donor(
    rows: Mapping[str, Tensor],
    length: int,
    before: str,
    parts: Mapping[str, str] = NO_PARTS,
    notes: Mapping[str, str] = NO_PARTS,
    *,
    cuts: Sequence[int] = (),
    cost_ms: float | None = None,
) -> Entry:
    """Return a donor of one context.

    Args:
        rows: ``length`` rows of each slot.
        length: tokens of the item.
        before: digest of the blocks before the item.
        parts: what its key covers, by name; to explain misses.
        notes: what explains its features, see ``MediaSpan``.
        cuts: where its maps of recurrent layers begin and end, see ``plan.jumps``.
        cost_ms: what computing the rows again would take; None if not measured.
    """
    info: dict[str, Json] = {"kind": "donor", "length": length, "before": before, "contexts": [before]}
    if cuts:
        info[CUTS] = list(cuts)
    info |= {name: dict(value) for name, value in (("parts", parts), ("notes", notes)) if value}
    return Entry(rows, with_cost(info, cost_ms))


def admit_exact(
    store: Store, key: str, rows: Mapping[str, Tensor], length: int, before: str, *, cost_ms: float | None
) -> bool:
    """Store rows that serve in their context alone; return False if the store refused them.

    Args:
        store: the store.
        key: key of the block.
        rows, length, before, cost_ms: as in ``exact_donor``.
    """
    return store.put(key, exact_donor(rows, length, before, parts_of(key), cost_ms=cost_ms))


def packed(donor: Entry, packing: Packing) -> Entry:
    """Return an exact donor in packed form. It has no ``before``: it is exact nowhere."""
    info = {name: value for name, value in donor.info.items() if name != "before"}
    return Entry(packing.pack(donor.tensors), {**info, "donor_dtype": packing.donor_dtype}, copy=False)


def refined(
    donor: Entry,
    rows: Mapping[str, Tensor],
    before: str,
    packing: Packing | None = None,
    *,
    differences: Differences | None = None,
    cost_ms: float | None = None,
) -> Entry | None:
    """Return a new donor with one more context in its mean; it has no ``before``, as it is exact nowhere.

    None if the donor has differences, and they tell of the new context already.

    A running mean, in float32 or wider, rounded to the donor's dtype once per context. After n contexts its
    error is at most (n + 1) / 4 - 1 / (2 n) units in the last place of the largest value: 1.125 for n = 4.

    A packed donor is unpacked and packed anew. Its roundings add up to at most (n + 1) / 4 of the largest
    scale: 1.25 for n = 4 instead of 0.5 for one context; their root mean square rises by a factor of 1.37. A
    mean that is kept unpacked would take more bytes than full-size donors.

    Args:
        donor: the mean so far; its tensors are only read.
        rows: exact rows of the same slots and shapes.
        before: digest of the blocks before them, not in ``contexts_of(donor)``.
        packing: packs the new donor; None for full size.
        differences: stores the contexts' differences from their mean; None for the mean alone.
        cost_ms: as in ``admit_item``; None keeps that of the donor.
    """
    contexts = [*contexts_of(donor), before]
    info = {name: value for name, value in donor.info.items() if name != "before"}
    before_means = {name: rows_of(donor, name) for name in rows}
    beside: dict[str, Tensor] | None = {}
    if differences is not None:
        beside = differences.with_context(donor, before_means, rows, len(contexts) - 1)
    if beside is None:
        return None
    with torch.no_grad():
        means = {name: _mean(before_means[name], rows[name], len(contexts)) for name in rows}
    tensors = beside | (means if packing is None else packing.pack(means))
    return Entry(tensors, with_cost({**info, "contexts": list(contexts)}, cost_ms), copy=False)


def _mean(mean: Tensor, new: Tensor, count: int) -> Tensor:
    """Return the mean of ``count`` tensors: ``new``, and the others with the mean ``mean``."""
    wide = torch.promote_types(mean.dtype, torch.float32)
    before = mean.to(new.device).to(wide)
    return before.add(new.to(wide).sub(before), alpha=1 / count).to(mean.dtype)


def admit_item(
    store: Store,
    key: str,
    rows: Mapping[str, Tensor],
    length: int,
    before: str,
    max_contexts: int,
    packing: Packing | None = None,
    *,
    differences: Differences | None = None,
    notes: Mapping[str, str] = NO_PARTS,
    cuts: Sequence[int] = (),
    cost_ms: float | None = None,
) -> bool:
    """Store exact rows of an item; return False if the store refused them.

    If two threads refine a donor at the same time, one of the two contexts is lost; entries stay consistent.

    Args:
        store: the store of the donor.
        key: key of the donor.
        rows: ``length`` rows of each slot.
        length: tokens of the item.
        before: digest of the blocks before the item; a context counts once.
        max_contexts: maximum number of contexts in the mean. With 1, the latest context replaces the donor.
        packing: packs the donor; None for full size. A packed donor has no exact copy beside it: the copy
            would take twice the donor's bytes.
        differences: as in ``refined``.
        notes: what explains the item's features, see ``MediaSpan``.
        cuts: where maps of recurrent layers begin and end. Maps of other cuts are no context of one mean.
        cost_ms: what computing the rows again would take; None if not measured.
    """
    parts = parts_of(key)
    donor = store.get(key) if max_contexts > 1 and key in store else None
    is_like = donor is not None and _match(donor, rows) and donor.info.get(CUTS, []) == [*cuts]
    if donor is None or is_packed(donor) != (packing is not None) or not is_like:
        if donor is not None and rows.keys() < slots_of(donor):
            return True  # a graph that records more slots stored it; it serves this graph too
        exact = exact_donor(rows, length, before, parts, notes, cuts=cuts, cost_ms=cost_ms)
        return store.put(key, exact if packing is None else packed(exact, packing))
    contexts = contexts_of(donor)
    if contexts == (before,):
        return True
    if packing is None:
        # The copy comes first: the donor is then more recent, and the copy is evicted before it.
        store.put(exact_key(key), exact_donor(rows, length, before, parts, notes, cuts=cuts, cost_ms=cost_ms))
    if before in contexts or len(contexts) >= max_contexts:
        return True
    better = refined(donor, rows, before, packing, differences=differences, cost_ms=cost_ms)
    return better is None or store.put(key, better)


def _match(donor: Entry, rows: Mapping[str, Tensor]) -> bool:
    return slots_of(donor) == rows.keys() and all(
        (donor.peek(name).shape, dtype_of(donor, name)) == (new.shape, new.dtype)
        for name, new in rows.items()
    )
