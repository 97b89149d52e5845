"""Donors refine: the mean over the contexts in which an item was computed exactly.

A donor is right for one context and off in every other. The mean over several contexts is right for none of
them, but nearer to most others.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vlcache_fx.keys.digest import content_digest
from vlcache_fx.store.base import Store
from vlcache_fx.store.entry import Entry


def contexts_of(entry: Entry) -> tuple[str, ...]:
    """Digests of the contexts that a donor is the mean of: of everything in front of its item, each time."""
    known = entry.info.get("contexts")
    return tuple(map(str, known)) if isinstance(known, list) else (str(entry.info.get("before")),)


def exact_key(key: str) -> str:
    """Where the exact rows of an item's latest context lie, beside its refined donor.

    Of the key alone, not of the context too: a copy per context would push donors of other items out of the
    store, for conversations that most likely never go on. So an item holds two entries at most, and as with
    donors that do not refine, its latest context is the one known exactly. No copy is needed before the
    second context: until then the donor itself is exact.
    """
    return content_digest(["exact", key])


def exact_donor(rows: Mapping[str, Tensor], length: int, before: str) -> Entry:
    """An entry of one context, in which ``before`` is the digest of all that the rows depend on."""
    return Entry(rows, {"kind": "donor", "length": length, "before": before, "contexts": [before]})


def refined(donor: Entry, rows: Mapping[str, Tensor], before: str) -> Entry:
    """The donor with one more context in its mean: a new entry, without ``before``, for it is exact nowhere.

    The mean is taken in float32 at least and rounded to the donor's dtype once per context, so that of n
    contexts is off by up to (n + 1) / 4 - 1 / (2 n) units in the last place of the largest value: 1.125 with
    four. What old contexts said need not be kept for it.

    Args:
        donor: of the contexts so far; its tensors are only read.
        rows: of the same slots and shapes, computed exactly.
        before: the digest of what is in front of them, not among ``contexts_of(donor)``.
    """
    contexts = [*contexts_of(donor), before]
    info = {name: value for name, value in donor.info.items() if name != "before"}
    with torch.no_grad():
        means = {name: _mean(donor.tensors[name], rows[name], len(contexts)) for name in donor.tensors}
    return Entry(means, {**info, "contexts": list(contexts)}, copy=False)


def _mean(mean: Tensor, new: Tensor, count: int) -> Tensor:
    """The mean of ``count`` tensors, of which ``mean`` is that of all but ``new``."""
    wide = torch.promote_types(mean.dtype, torch.float32)
    before = mean.to(new.device).to(wide)
    return before.add(new.to(wide).sub(before), alpha=1 / count).to(mean.dtype)


def admit_item(
    store: Store, key: str, rows: Mapping[str, Tensor], length: int, before: str, max_contexts: int
) -> bool:
    """Store rows of an item that were computed exactly; False where the store refused them.

    Two threads that refine one donor at the same time lose one of the two contexts, no more: entries are
    replaced as a whole.

    Args:
        store: where the donor is or will be.
        key: of the donor.
        rows: ``length`` rows of each slot.
        length: of the item, in tokens.
        before: digest of what is in front of the item; the same context counts once.
        max_contexts: as many go into a donor's mean. With 1 the latest context replaces the donor.
    """
    donor = store.get(key) if max_contexts > 1 and key in store else None
    if donor is None or not _same_form(donor.tensors, rows):
        if donor is not None and rows.keys() < donor.tensors.keys():
            return True  # of a graph that records more; it serves this one as well
        return store.put(key, exact_donor(rows, length, before))
    contexts = contexts_of(donor)
    if contexts == (before,):
        return True
    # The copy first: the donor is then the more recent of the two, so that the copy is evicted before it.
    store.put(exact_key(key), exact_donor(rows, length, before))
    if before in contexts or len(contexts) >= max_contexts:
        return True
    return store.put(key, refined(donor, rows, before))


def _same_form(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> bool:
    return old.keys() == new.keys() and all(
        (old[name].shape, old[name].dtype) == (new[name].shape, new[name].dtype) for name in old
    )
