"""Donors in and out of the store."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vlcache_fx.plan.types import Span
from vlcache_fx.store.base import Store
from vlcache_fx.store.entry import Entry


def tables(entries: Sequence[Entry], dims: Mapping[str, int], device: torch.device) -> dict[str, Tensor]:
    """Donor tables per slot: the rows of all entries, one behind the other.

    A single donor is handed over as it lies in the store; several are joined.
    """
    made = {}
    for slot, dim in dims.items():
        parts = [entry.tensors[slot].to(device, non_blocking=True) for entry in entries]
        made[slot] = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return made


def fits(entry: Entry | None, dims: Mapping[str, int], length: int) -> bool:
    """True where the entry has every slot that a program reads, with ``length`` rows each."""
    return entry is not None and all(
        slot in entry.tensors and entry.tensors[slot].shape[dim] == length for slot, dim in dims.items()
    )


def admit(store: Store, span: Span, recorded: Mapping[str, Tensor], dims: Mapping[str, int]) -> bool:
    """Store the rows of one span; False where the store refused them."""
    rows = {slot: recorded[slot].narrow(dim, span.start, span.length) for slot, dim in dims.items()}
    return store.put(span.key, Entry(rows, {"kind": "donor", "length": span.length}))
