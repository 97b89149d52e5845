"""Donors in and out of the store."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from vlcache_fx.plan.types import Plan
from vlcache_fx.runtime.donors import refine
from vlcache_fx.runtime.programs.lowered import PendingTensor
from vlcache_fx.runtime.requests.blocks import Piece
from vlcache_fx.spec.decoder import RowSpec
from vlcache_fx.spec.slots import Key, StoredSlot, Value
from vlcache_fx.store.base import Store
from vlcache_fx.store.entry import Entry


def rows_of_sample(spec: RowSpec, recorded: Tensor, sample: int) -> Tensor:
    """The part of what a program recorded that belongs to one sample."""
    return recorded if spec.batch_dim is None else recorded.narrow(spec.batch_dim, sample, 1)


def _are_rows(spec: RowSpec, tensor: Tensor, length: int) -> bool:
    """True for ``length`` rows as ``spec`` describes them."""
    return (
        tensor.dtype == getattr(torch, spec.dtype)
        and tensor.dim() == len(spec.sizes)
        and tensor.shape[spec.dim] == length
        and all(want is None or size == want for size, want in zip(tensor.shape, spec.sizes, strict=True))
    )


def tables(
    entries: Sequence[Entry], specs: Mapping[StoredSlot, RowSpec], device: torch.device
) -> dict[StoredSlot, Tensor | PendingTensor]:
    """Donor tables per slot: the rows of all entries, one behind the other.

    A single donor is handed over as it lies in the store; several are joined. Donors of a host tier are
    brought in on a stream of their own, in the order of ``specs``, which is that of the layers, while earlier
    layers compute.
    """

    def table(slot: StoredSlot, dim: int) -> Tensor:
        parts = [entry.tensors[str(slot)].to(device, non_blocking=True) for entry in entries]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    if device.type != "cuda" or all(t.device == device for entry in entries for t in entry.tensors.values()):
        return {slot: table(slot, spec.dim) for slot, spec in specs.items()}
    made: dict[StoredSlot, Tensor | PendingTensor] = {}
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    for slot, spec in specs.items():
        with torch.cuda.stream(side):
            tensor, event = table(slot, spec.dim), torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(side)
        tensor.record_stream(current)  # its memory was allocated for the side stream
        made[slot] = PendingTensor(tensor, functools.partial(current.wait_event, event))
    return made


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def fits(entry: Entry | None, specs: Mapping[StoredSlot, RowSpec], length: int) -> bool:
    """True where the entry has every slot that a program reads, with ``length`` rows of its form each."""
    return entry is not None and all(
        str(slot) in entry.tensors and _are_rows(spec, entry.tensors[str(slot)], length)
        for slot, spec in specs.items()
    )


def length_of(entry: Entry) -> int:
    """The number of rows of a donor."""
    length = entry.info["length"]
    assert isinstance(length, int)
    return length


def admit(
    store: Store,
    piece: Piece,
    recorded: Mapping[StoredSlot, Tensor],
    specs: Mapping[StoredSlot, RowSpec],
    plan: Plan,
    sample: int = 0,
    max_contexts: int = 1,
) -> bool:
    """Store the rows of one piece, all of which were computed exactly; False where the store refused them.

    Donors of media refine: up to ``max_contexts`` contexts go into their mean.
    """
    places: dict[int, int] = {}  # equal neighbours among a plan's rows are one object
    rows = {}
    for slot, spec in specs.items():
        level = slot.layer if isinstance(slot, Key | Value) else plan.num_layers
        active = plan.rows[level]
        if id(active) not in places:
            places[id(active)] = int(torch.searchsorted(active, piece.start))
        own = rows_of_sample(spec, recorded[slot], sample)
        rows[str(slot)] = own.narrow(spec.dim, places[id(active)], piece.length)
    if piece.span is not None:
        return refine.admit_item(store, piece.key, rows, piece.length, piece.before, max_contexts)
    return store.put(piece.key, refine.exact_donor(rows, piece.length, piece.before))


def known_prefix(
    pieces: Iterable[Piece], find: Callable[[Piece], Entry | None], specs: Mapping[StoredSlot, RowSpec]
) -> tuple[int, list[Entry]]:
    """How many leading tokens have exact donors, and these.

    Args:
        pieces: of the prompt, in order.
        find: the entry under a piece's key.
        specs: what programs read.
    """
    length, known = 0, []
    for piece in pieces:
        entry = find(piece)
        # The rows of a media item may have been computed behind something else: good to reuse, but not exact.
        # A refined donor has no `before` at all.
        if entry is None or entry.info.get("before") != piece.before or not fits(entry, specs, piece.length):
            break
        known.append(entry)
        length = piece.end
    return length, known
