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
from vlcache_fx.store.entry import Entry


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
    of ``specs``, which is that of layers, while earlier layers compute. A single donor of a slow tier, on the
    CPU, is pending: later layers may arrive while earlier ones compute.
    """

    def table(slot: StoredSlot, dim: int) -> Tensor:
        parts = [entry.tensors[str(slot)].to(device, non_blocking=True) for entry in entries]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    if len(entries) == 1 and device.type == "cpu":
        (entry,), slots = entries, [str(slot) for slot in specs]
        waits = [entry.wait_of(slot) for slot in slots]
        return {
            slot: entry.peek(name) if wait is None else PendingTensor(entry.peek(name), wait)
            for slot, name, wait in zip(specs, slots, waits, strict=True)
        }
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
    *,
    cost_ms: float | None = None,
) -> bool:
    """Store the exact rows of one block; return False if the store refused them.

    Donors of spans are means of up to ``max_contexts`` contexts, see ``refine``. ``cost_ms`` is what
    computing the rows again would take, None if not measured.
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
        return refine.admit_item(
            store, block.key, rows, block.length, block.before, max_contexts, cost_ms=cost_ms
        )
    return store.put(block.key, refine.exact_donor(rows, block.length, block.before, cost_ms=cost_ms))


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
