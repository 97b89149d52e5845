"""Moves donors between the store and programs."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from vlcache_fx.plan.types import Plan
from vlcache_fx.runtime.donors import refine
from vlcache_fx.runtime.programs.lowered import PendingTensor
from vlcache_fx.runtime.requests.blocks import Block
from vlcache_fx.spec.decoder import RowSpec
from vlcache_fx.spec.slots import Key, StoredSlot, Value
from vlcache_fx.store.base import Store
from vlcache_fx.store.entry import Entry, Wait


def rows_of_sample(spec: RowSpec, recorded: Tensor, sample: int) -> Tensor:
    """Return the rows of one sample in a tensor that a program recorded."""
    return recorded if spec.batch_dim is None else recorded.narrow(spec.batch_dim, sample, 1)


def _are_rows(spec: RowSpec, tensor: Tensor, length: int) -> bool:
    """Return True if the tensor has ``length`` rows that match ``spec``."""
    return (
        tensor.dtype == getattr(torch, spec.dtype)
        and tensor.dim() == len(spec.sizes)
        and tensor.shape[spec.dim] == length
        and all(want is None or size == want for size, want in zip(tensor.shape, spec.sizes, strict=True))
    )


def tables(
    entries: Sequence[Entry], specs: Mapping[StoredSlot, RowSpec], device: torch.device
) -> dict[StoredSlot, Tensor | PendingTensor]:
    """Return the donor table of each slot: the concatenated rows of all entries.

    A single donor is used without a copy. Donors of the host tier are copied on a side stream, in the order
    of ``specs``, which is that of layers, while earlier layers compute. On the CPU, donors of a slow tier are
    pending: later layers may arrive while earlier ones compute.
    """

    def table(slot: StoredSlot, dim: int) -> Tensor:
        parts = [entry.tensors[str(slot)].to(device, non_blocking=True) for entry in entries]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    if device.type == "cpu" and any(_waits(entries, slot) for slot in specs):
        return {slot: _pending(entries, slot, spec.dim) for slot, spec in specs.items()}
    if device.type != "cuda" or all(t.device == device for entry in entries for t in entry.tensors.values()):
        return {slot: table(slot, spec.dim) for slot, spec in specs.items()}
    found: dict[StoredSlot, Tensor | PendingTensor] = {}
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    for slot, spec in specs.items():
        with torch.cuda.stream(side):
            tensor, event = table(slot, spec.dim), torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(side)
        tensor.record_stream(current)  # its memory was allocated for the side stream
        found[slot] = PendingTensor(tensor, functools.partial(current.wait_event, event))
    return found


def _waits(entries: Iterable[Entry], slot: StoredSlot) -> list[Wait]:
    waits = (entry.wait_of(str(slot)) for entry in entries)
    return [wait for wait in waits if wait is not None]


def _pending(entries: Sequence[Entry], slot: StoredSlot, dim: int) -> PendingTensor:
    """Return a table on the CPU that is complete after its ``wait``."""
    waits, parts = _waits(entries, slot), [entry.peek(str(slot)) for entry in entries]
    sizes = list(parts[0].shape)
    sizes[dim] = sum(part.shape[dim] for part in parts)
    table = parts[0] if len(parts) == 1 else parts[0].new_empty(sizes)

    @functools.cache  # a probe and a run share it; an error is raised to both
    def wait() -> None:
        for arrive in waits:
            arrive()
        if len(parts) > 1:
            torch.cat(parts, dim, out=table)

    return PendingTensor(table, wait)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def fits(entry: Entry | None, specs: Mapping[StoredSlot, RowSpec], length: int) -> bool:
    """Return True if the entry has ``length`` rows of every slot that a program reads."""
    return entry is not None and all(
        str(slot) in entry.tensors and _are_rows(spec, entry.peek(str(slot)), length)
        for slot, spec in specs.items()
    )


def length_of(entry: Entry) -> int:
    """Return the number of rows of a donor."""
    length = entry.info["length"]
    assert isinstance(length, int)
    return length


def admit(
    store: Store,
    block: Block,
    recorded: Mapping[StoredSlot, Tensor],
    specs: Mapping[StoredSlot, RowSpec],
    plan: Plan,
    sample: int = 0,
    max_contexts: int = 1,
) -> bool:
    """Store the exact rows of one block; return False if the store refused them.

    Donors of spans are means of up to ``max_contexts`` contexts, see ``refine``.
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
    if block.span is not None:
        return refine.admit_item(store, block.key, rows, block.length, block.before, max_contexts)
    return store.put(block.key, refine.exact_donor(rows, block.length, block.before))


def exact_prefix(
    blocks: Iterable[Block], find: Callable[[Block], Entry | None], specs: Mapping[StoredSlot, RowSpec]
) -> tuple[int, list[Entry]]:
    """Return the number of leading tokens with exact donors, and these donors.

    Args:
        blocks: the blocks of the prompt, in order.
        find: returns the entry of a block.
        specs: the rows that programs read.
    """
    length, entries = 0, []
    for block in blocks:
        entry = find(block)
        # A span's donor may be of another context: fit for reuse, but not exact. A refined donor has no
        # ``before``.
        if entry is None or entry.info.get("before") != block.before or not fits(entry, specs, block.length):
            break
        entries.append(entry)
        length = block.end
    return length, entries
