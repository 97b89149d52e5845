"""Binds differences of donors' contexts to programs that fit them, see ``ops.fit``."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlcache_fx.runtime.donors.donor_dtype import length_of
from vlcache_fx.runtime.donors.subspace import LEAST_CONTEXTS, LEAST_RANK, differences_fit, part_names
from vlcache_fx.runtime.programs.lowered import PendingTensor
from vlcache_fx.runtime.requests.request import Request
from vlcache_fx.spec.decoder import RowSpec
from vlcache_fx.spec.differences import BLOCK_ROWS
from vlcache_fx.spec.slots import Difference, DonorRow, InputSlot, Key, LeftDonor, LeftRow, StoredSlot, Value
from vlcache_fx.store.entry import Entry

LEAST_ENTRIES = 2
"""Fewest blocks and donors that programs take: compilers specialise on one."""


@dataclass(frozen=True)
class FittedDonor:
    """A donor with differences, as a request reads it.

    Attributes:
        entry: the donor.
        sample: index of the sample.
        start: first token of its span.
        first_row: its first row in the donor table.
    """

    entry: Entry
    sample: int
    start: int
    first_row: int

    @property
    def length(self) -> int:
        """Number of its rows."""
        return length_of(self.entry)

    @property
    def num_blocks(self) -> int:
        """Number of its blocks of left rows."""
        return -(-self.length // BLOCK_ROWS)


def fitted_donors(request: Request, specs: Mapping[StoredSlot, RowSpec]) -> list[FittedDonor]:
    """Return the donors of reused spans that have differences, in the order of the donor table."""
    found, first_row = [], 0
    for index, sample in enumerate(request.samples):
        spans = iter([span for span in sample.spans if span.hit and span.start >= sample.prefix])
        end = first_row + sample.prefix
        for entry in sample.donors:
            if first_row >= end:  # behind the exact prefix
                span = next(spans)
                if differences_fit(entry, specs):
                    found.append(FittedDonor(entry, index, span.start, first_row))
            first_row += length_of(entry)
    return found


def fitting_tables(
    donors: Sequence[FittedDonor],
    request: Request,
    specs: Mapping[StoredSlot, RowSpec],
    device: torch.device,
) -> dict[InputSlot, Tensor | PendingTensor]:
    """Return the inputs that ``fit_donors`` adds to a program.

    Args:
        donors: one or more, from ``fitted_donors``.
        request: the request that reads them.
        specs: the slots of rows.
        device: the program's device.
    """
    donor_row, left_row = (torch.full((len(request.samples), request.num_tokens), -1) for _ in range(2))
    left_donor: list[int] = []
    for number, donor in enumerate(donors):
        tokens = slice(donor.start, donor.start + donor.length)
        donor_row[donor.sample, tokens] = torch.arange(donor.length) + donor.first_row
        left_row[donor.sample, tokens] = torch.arange(donor.length) + len(left_donor) * BLOCK_ROWS
        left_donor += [number] * donor.num_blocks
    left_donor += [0] * (LEAST_ENTRIES - len(left_donor))
    if len(request.samples) == 1:
        donor_row, left_row = donor_row[0], left_row[0]
    found: dict[InputSlot, Tensor | PendingTensor] = {
        DonorRow(): donor_row.to(device, non_blocking=True),
        LeftRow(): left_row.to(device, non_blocking=True),
        LeftDonor(): torch.tensor(left_donor).to(device, non_blocking=True),
    }
    is_late = any(donor.entry.is_pending for donor in donors)
    for slot, spec in specs.items():
        if not isinstance(slot, Key | Value):
            continue
        sizes = _Sizes.of(donors, slot, spec)
        for part in Difference.parts:
            table = functools.partial(_table, part, donors, slot, sizes, device)
            found[Difference(slot, part)] = PendingTensor(table) if is_late else table()
    return found


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a slot's tables: those of the largest donor."""

    rank: int
    contexts: int
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, donors: Sequence[FittedDonor], slot: StoredSlot, spec: RowSpec) -> _Sizes:
        cores = [donor.entry.peek(part_names(slot)[1]).shape for donor in donors if _has(donor, slot)]
        rows = donors[0].entry.peek(str(slot))
        return cls(
            max((shape[1] for shape in cores), default=LEAST_RANK),
            max((shape[0] for shape in cores), default=LEAST_CONTEXTS),
            rows.numel() // rows.shape[spec.dim],
            getattr(torch, spec.dtype),
        )

    def of_donor(self, part: str, donor: FittedDonor) -> tuple[int, ...]:
        """Sizes of a donor's part of a table."""
        match part:
            case "left":
                return donor.num_blocks * BLOCK_ROWS, self.rank
            case "core":
                return self.contexts, self.rank, self.rank
            case _:
                return self.rank, self.width


def _has(donor: FittedDonor, slot: StoredSlot) -> bool:
    return part_names(slot)[0] in donor.entry.tensors


def _table(
    part: str, donors: Sequence[FittedDonor], slot: StoredSlot, sizes: _Sizes, device: torch.device
) -> Tensor:
    """Join one part of all donors; zeros stand for what a donor does not have."""
    made = []
    for donor in donors:
        shape = sizes.of_donor(part, donor)
        if not _has(donor, slot):
            made.append(torch.zeros(shape, dtype=sizes.dtype, device=device))
            continue
        own = donor.entry.tensors[f"{slot}.{part}"].to(device, non_blocking=True)
        missing = [end - size for size, end in zip(reversed(own.shape), reversed(shape), strict=True)]
        made.append(pad(own, [after for size in missing for after in (0, size)]) if any(missing) else own)
    if part == "left":
        table = (made[0] if len(made) == 1 else torch.cat(made)).view(-1, BLOCK_ROWS, sizes.rank)
    else:
        table = torch.stack(made)
    missing_entries = LEAST_ENTRIES - len(table)
    return pad(table, [0, 0] * (table.dim() - 1) + [0, missing_entries]) if missing_entries > 0 else table
