"""Moves donors between the store and programs."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from vlcache_fx.plan.types import Plan
from vlcache_fx.runtime.donors import refine
from vlcache_fx.runtime.donors.donor_dtype import (
    MODEL,
    PACKED,
    Packing,
    are_complete,
    is_packed,
    parts_of,
    unpacked,
)
from vlcache_fx.runtime.donors.states import has_states, recorded_states
from vlcache_fx.runtime.donors.subspace import Differences
from vlcache_fx.runtime.programs.lowered import PendingTensor
from vlcache_fx.runtime.requests.blocks import Block
from vlcache_fx.spec.decoder import RowSpec, StateSpec
from vlcache_fx.spec.slots import Key, Packed, StoredSlot, Value
from vlcache_fx.store.base import Store
from vlcache_fx.store.entry import Entry


def rows_of_sample(spec: RowSpec, recorded: Tensor, sample: int) -> Tensor:
    """Return the rows of one sample in a tensor that a program recorded."""
    return recorded if spec.batch_dim is None else recorded.narrow(spec.batch_dim, sample, 1)


def _are_rows(slot: StoredSlot, spec: RowSpec, entry: Entry, length: int) -> bool:
    """Return True if the entry has ``length`` rows of a slot that match ``spec``."""
    tensor = entry.peek(str(slot))
    return (
        tensor.dim() == len(spec.sizes)
        and tensor.shape[spec.dim] == length
        and all(want is None or size == want for size, want in zip(tensor.shape, spec.sizes, strict=True))
        and are_complete(entry, slot, spec)
    )


def tables(
    entries: Sequence[Entry], specs: Mapping[StoredSlot, RowSpec], device: torch.device
) -> dict[StoredSlot, Tensor | PendingTensor]:
    """Return the donor table of each slot: the concatenated rows of all entries.

    A single donor is used without a copy. Donors of the host tier are copied on a side stream, in the order
    of ``specs``, which is that of layers, while earlier layers compute. On the CPU, donors of a slow tier are
    pending: later layers may arrive while earlier ones compute. Packed donors are pending, too: a layer's
    rows are unpacked when its program first reads them, so only one layer's are full-size at a time.
    """
    is_late = any(is_packed(entry) or entry.is_pending for entry in entries)
    is_there = device.type != "cuda" or all(
        entry.peek(name).device == device for entry in entries for name in entry.tensors
    )
    if is_there and not is_late:
        return {slot: _table(_parts(entries, slot, device), spec.dim) for slot, spec in specs.items()}
    if is_there:
        return {
            slot: PendingTensor(functools.partial(_late_table, entries, slot, spec.dim, device))
            for slot, spec in specs.items()
        }
    found: dict[StoredSlot, Tensor | PendingTensor] = {}
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    for slot, spec in specs.items():
        with torch.cuda.stream(side):
            parts, event = _parts(entries, slot, device), torch.cuda.Event()  # type: ignore[no-untyped-call]
            made = None if any(map(is_packed, entries)) else _table(parts, spec.dim)
            event.record(side)
        # Their memory was allocated for the side stream.
        for tensor in [made] if made is not None else [part for own in parts for part in own]:
            tensor.record_stream(current)
        later = functools.partial(_table, parts, spec.dim) if made is None else made
        found[slot] = PendingTensor(later, functools.partial(current.wait_event, event))
    return found


def single_packed(
    entries: Sequence[Entry], specs: Mapping[StoredSlot, RowSpec], device: torch.device
) -> tuple[torch.dtype, dict[Packed, Tensor | PendingTensor]] | None:
    """Return the dtype and the tensors of a packed donor, for programs that unpack a table of one donor.

    None where ``tables`` must unpack: several donors (each has scales of its own), exact text beside it, a
    slot that could not be packed, or a donor on another device. Tensors of slow tiers are pending.
    """
    if len(entries) != 1 or not is_packed(entries[0]):
        return None
    entry = entries[0]
    found: dict[Packed, Tensor | PendingTensor] = {}
    dtypes = {entry.peek(str(slot)).dtype for slot in specs}
    if len(dtypes) != 1 or not dtypes <= {*PACKED.values()}:
        return None
    for slot in specs:
        for name, part in zip(parts_of(entry, str(slot)), Packed.parts, strict=False):
            if entry.peek(name).device != device:
                return None
            found[Packed(slot, part)] = (
                PendingTensor(functools.partial(entry.tensors.__getitem__, name))
                if entry.is_pending
                else entry.tensors[name]
            )
    return dtypes.pop(), found


Parts: TypeAlias = Sequence[Sequence[Tensor]]
"""Per entry, the tensors of one slot: its rows, and what unpacks them."""


def _parts(entries: Sequence[Entry], slot: StoredSlot, device: torch.device) -> Parts:
    return [
        [entry.tensors[part].to(device, non_blocking=True) for part in parts_of(entry, str(slot))]
        for entry in entries
    ]


def _table(parts: Parts, dim: int) -> Tensor:
    rows = [unpacked(*own) for own in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim)


def _late_table(entries: Sequence[Entry], slot: StoredSlot, dim: int, device: torch.device) -> Tensor:
    return _table(_parts(entries, slot, device), dim)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def fits(entry: Entry | None, specs: Mapping[StoredSlot, RowSpec], length: int) -> bool:
    """Return True if the entry has ``length`` rows of every slot that a program reads."""
    return entry is not None and all(
        str(slot) in entry.tensors and _are_rows(slot, spec, entry, length) for slot, spec in specs.items()
    )


def misfit(entry: Entry, specs: Mapping[StoredSlot, RowSpec], length: int) -> str:
    """Return which slot of an entry does not fit: what is read and what is there. Empty if all do."""
    for slot, spec in specs.items():
        name, sizes = str(slot), list(spec.sizes)
        if name not in entry.tensors:
            return f"slot {name} is missing"
        found = entry.peek(name)
        if not _are_rows(slot, spec, entry, length):
            sizes[spec.dim] = length
            wanted = ", ".join("any" if size is None else str(size) for size in sizes)
            dtype = str(found.dtype).removeprefix("torch.")
            return f"slot {name}: expected {spec.dtype} [{wanted}], found {dtype} {list(found.shape)}"
    return ""


def admit(
    store: Store,
    block: Block,
    recorded: Mapping[StoredSlot, Tensor],
    specs: Mapping[StoredSlot, RowSpec],
    plan: Plan,
    sample: int = 0,
    max_contexts: int = 1,
    donor_dtype: str = MODEL,
    *,
    donor_rank: int = 0,
    states: Sequence[StateSpec] = (),
    cost_ms: float | None = None,
) -> bool:
    """Store the exact rows and states of one block; return False if the store refused them.

    Donors of spans are means of up to ``max_contexts`` contexts, see ``refine``, in ``donor_dtype``, with
    differences of up to ``donor_rank``, see ``subspace``. Rows of text are never packed: they serve as exact
    prefixes. ``cost_ms`` is what computing the rows again would take, None if not measured.
    """
    starts: dict[int, int] = {}  # by id: levels of a plan share equal row tensors
    rows = {}
    for slot, spec in specs.items():
        level = slot.layer if isinstance(slot, Key | Value) else plan.num_layers
        active = plan.rows[level]
        if id(active) not in starts:
            starts[id(active)] = int(torch.searchsorted(active, block.start))
        own = rows_of_sample(spec, recorded[slot], sample)
        rows[str(slot)] = own.narrow(spec.dim, starts[id(active)], block.length)
    carried, cuts = (
        recorded_states(
            recorded,
            states,
            plan.records,
            block.start,
            block.end,
            with_maps=block.span is not None,
            sample=sample,
        )
        if states
        else ({}, ())
    )
    rows |= carried
    if block.span is not None:
        packing = Packing.of(donor_dtype, specs)
        return refine.admit_item(
            store,
            block.key,
            rows,
            block.length,
            block.before,
            max_contexts,
            packing,
            differences=Differences.of(donor_rank, max_contexts, specs),
            notes=block.notes,
            cuts=cuts,
            cost_ms=cost_ms,
        )
    return refine.admit_exact(store, block.key, rows, block.length, block.before, cost_ms=cost_ms)


def exact_prefix(
    blocks: Iterable[Block],
    find: Callable[[Block], Entry | None],
    specs: Mapping[StoredSlot, RowSpec],
    states: Sequence[StateSpec] = (),
    longest: int | None = None,
) -> tuple[int, list[Entry]]:
    """Return the number of leading tokens with exact donors, and these donors.

    Args:
        blocks: the blocks of the prompt, in order.
        find: returns the entry of a block.
        specs: the rows that programs read.
        states: states of recurrent layers: the last of these donors has them.
        longest: most tokens of the prefix.
    """
    length, entries = 0, []
    num_kept = kept = 0  # up to the last donor from whose states the prompt can continue
    for block in blocks:
        if longest is not None and block.end > longest:
            break
        entry = find(block)
        # A span's donor may be of another context: fit for reuse, but not exact. A refined donor has no
        # ``before``, nor has a packed one.
        if entry is None or entry.info.get("before") != block.before or not fits(entry, specs, block.length):
            break
        entries.append(entry)
        length = block.end
        if not states or has_states(entry, states):
            num_kept, kept = len(entries), length
    return kept, entries[:num_kept]
