"""States of recurrent layers in donors: what is stored of them, and the tables that programs read.

A media item's donor has the maps between its cuts, and the state behind it in the prompt in which it was
computed; a block of text has the state, where a prompt may continue from it. See ``plan.jumps``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlcache_fx.plan.jumps import LEAST_ENTRIES, Record
from vlcache_fx.runtime.donors.donor_dtype import length_of
from vlcache_fx.runtime.programs.lowered import PendingTensor
from vlcache_fx.runtime.requests.request import Request
from vlcache_fx.spec.decoder import StateSpec
from vlcache_fx.spec.slots import Factor, Inputs, Matrix, StoredSlot, Term
from vlcache_fx.store.entry import Entry

CUTS = "cuts"
"""Name in an entry's ``info`` of the offsets at which its maps begin and end."""


@dataclass(frozen=True)
class Use:
    """How a request uses a donor.

    Attributes:
        entry: the donor.
        is_prefix: its state is that behind an exact prefix. Otherwise its maps are applied.
    """

    entry: Entry
    is_prefix: bool


def uses_of(request: Request) -> list[Use]:
    """Return the donors from which states are read: the last of an exact prefix, and those of spans."""
    found = []
    for sample in request.samples:
        length = 0
        for entry in sample.donors:
            length += length_of(entry)
            if length >= sample.prefix:
                found.append(Use(entry, is_prefix=length == sample.prefix))
    return found


def cuts_of(entry: Entry, specs: Sequence[StateSpec], length: int) -> tuple[int, ...]:
    """Return the cuts of an item's donor; empty if it lacks a state that fits."""
    cuts = entry.info.get(CUTS)
    if not isinstance(cuts, list) or cuts[:1] != [0] or cuts[-1:] != [length]:
        return ()
    if any(not _fits(entry, spec, len(cuts) - 1) for spec in specs):
        return ()
    return tuple(int(cut) for cut in cuts if isinstance(cut, int))


def has_states(entry: Entry, specs: Sequence[StateSpec]) -> bool:
    """Return True if a prompt can continue from the entry's states."""
    return all(_fits(entry, spec, 0) for spec in specs if isinstance(spec.slot, Inputs | Matrix))


def _fits(entry: Entry, spec: StateSpec, num_maps: int) -> bool:
    if str(spec.slot) not in entry.tensors:
        return False
    tensor = entry.peek(str(spec.slot))
    sizes = tuple(num_maps if size is None else size for size in spec.sizes)
    return tuple(tensor.shape) == sizes and str(tensor.dtype) == f"torch.{spec.dtype}"


def state_tables(
    uses: Sequence[Use], specs: Sequence[StateSpec], device: torch.device, *, with_zeros: bool = False
) -> dict[StoredSlot, Tensor | PendingTensor]:
    """Return the table of each slot that a program reads: last inputs, factors and terms of all donors.

    Args:
        uses: the donors, sample by sample.
        specs: the states.
        device: the program's device.
        with_zeros: begin the tables of last inputs with zeros, which stand in front of a batch's samples.
    """
    found: dict[StoredSlot, Tensor | PendingTensor] = {}
    is_pending = any(use.entry.is_pending for use in uses)
    for spec in specs:
        if isinstance(spec.slot, Matrix):
            continue
        make = functools.partial(_table, uses, spec, device, with_zeros)
        found[spec.slot] = PendingTensor(make) if is_pending else make()
    return found


def _table(uses: Sequence[Use], spec: StateSpec, device: torch.device, with_zeros: bool) -> Tensor:
    slot = spec.slot
    assert isinstance(slot, Inputs | Factor | Term)
    parts = []
    for use in uses:
        if isinstance(slot, Inputs) or not use.is_prefix:
            part = use.entry.tensors[str(slot)]
        else:  # a map to the state, whatever stood before
            part = use.entry.tensors[str(Matrix(slot.layer, slot.index))][None]
            if isinstance(slot, Factor):
                part = part.new_zeros((1, *(size for size in spec.sizes if size is not None)))
        parts.append(part.to(device))
    if isinstance(slot, Inputs):
        if with_zeros:
            parts.insert(0, torch.zeros_like(parts[0]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    missing = LEAST_ENTRIES - sum(part.shape[0] for part in parts)
    if missing > 0:
        parts.append(parts[0].new_zeros((missing, *parts[0].shape[1:])))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def recorded_states(
    recorded: Mapping[StoredSlot, Tensor],
    specs: Sequence[StateSpec],
    records: Sequence[Record],
    start: int,
    end: int,
    *,
    with_maps: bool,
    sample: int = 0,
) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """Return what an entry for the tokens [start, end) stores, and its cuts.

    Args:
        recorded: results of the program.
        specs: the states.
        records: those that the program made, in order.
        start, end: the tokens.
        with_maps: also the maps of the records inside, for a media item. Otherwise the state alone.
        sample: index of the sample in the results.

    Returns:
        Nothing where no record ends with the tokens.
    """
    last = next((index for index, record in enumerate(records) if record.end == end), None)
    if last is None:
        return {}, ()
    inside = [i for i, record in enumerate(records) if record.start >= start and record.end <= end]
    found = {}
    for spec in specs:
        results, slot = recorded[spec.slot].narrow(0, sample, 1), spec.slot
        match slot:
            case Inputs():
                width = spec.sizes[-1]
                assert width is not None
                found[str(slot)] = results.narrow(-1, last * width, width)
            case Matrix():
                found[str(slot)] = results[0, last]
            case Factor() | Term() if with_maps:
                found[str(slot)] = results[0, inside[0] : inside[-1] + 1]
    cuts = (0, *(records[index].end - start for index in inside)) if with_maps else ()
    return found, cuts
