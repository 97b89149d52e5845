"""The inputs that fit donors: which donors have them, and how they are laid out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlcache_fx.lowering import PendingTensor
from vlcache_fx.plan.types import Span
from vlcache_fx.runtime.donors.fitting import LEAST_ENTRIES, fitted_donors, fitting_tables
from vlcache_fx.runtime.donors.subspace import part_names
from vlcache_fx.runtime.requests.request import Request, Sample
from vlcache_fx.spec.decoder import RowSpec
from vlcache_fx.spec.differences import BLOCK_ROWS
from vlcache_fx.spec.slots import Difference, DonorRow, Key, LeftDonor, LeftRow, StoredSlot, Value
from vlcache_fx.store import Entry

CPU = torch.device("cpu")
SPECS: dict[StoredSlot, RowSpec] = {
    Key(0): RowSpec(1, "float32", (1, None, 8)),
    Value(0): RowSpec(1, "float32", (1, None, 8)),
}


def donor(length: int, rank: int = 0, contexts: int = 3) -> Entry:
    tensors: dict[str, Tensor] = {}
    for slot in SPECS:
        tensors[str(slot)] = torch.randn(1, length, 8)
        if rank:
            parts = torch.randn(length, rank), torch.randn(contexts, rank, rank), torch.randn(rank, 8)
            tensors |= dict(zip(part_names(slot), parts, strict=True))
    return Entry(tensors, {"length": length})


def request(*samples: tuple[int, list[tuple[int, Entry]]], num_tokens: int = 400) -> Request:
    """Samples of a prefix and of spans behind it, each with its donor."""
    made = []
    for index, (prefix, spans) in enumerate(samples):
        own = tuple(
            Span(index, start, int(entry.info["length"]), f"{index}.{start}", True)  # type: ignore[arg-type]
            for start, entry in spans
        )
        entries = ([donor(prefix)] if prefix else []) + [entry for _, entry in spans]
        made.append(Sample(index, (), own, prefix, donors=tuple(entries)))
    return Request((), (), num_tokens, tuple(made), None)


def tables(given: Request) -> dict[Any, Any]:
    return fitting_tables(fitted_donors(given, SPECS), given, SPECS, CPU)


def test_donors_without_differences_are_left_out() -> None:
    given = request((10, [(20, donor(5)), (40, donor(7, rank=2)), (60, donor(9))]))
    (found,) = fitted_donors(given, SPECS)
    assert (found.sample, found.start, found.first_row, found.length) == (0, 40, 15, 7)
    assert fitted_donors(request((0, [(3, donor(5))])), SPECS) == []


def test_rows_of_tokens() -> None:
    given = request((10, [(20, donor(5, rank=2)), (40, donor(BLOCK_ROWS + 1, rank=2)), (200, donor(9))]))
    found = tables(given)
    rows, left = found[DonorRow()], found[LeftRow()]
    assert rows.shape == left.shape == (400,)
    assert rows[20:25].tolist() == [10, 11, 12, 13, 14]
    assert rows[40:43].tolist() == [15, 16, 17]
    assert left[20:25].tolist() == [0, 1, 2, 3, 4]
    assert left[40:43].tolist() == [BLOCK_ROWS, BLOCK_ROWS + 1, BLOCK_ROWS + 2]
    assert int((left >= 0).sum()) == 5 + BLOCK_ROWS + 1
    assert found[LeftDonor()].tolist() == [0, 1, 1]


def test_tables_hold_each_donor_in_the_sizes_of_the_largest() -> None:
    small, large = donor(5, rank=2, contexts=4), donor(BLOCK_ROWS + 1, rank=3, contexts=2)
    found = tables(request((0, [(20, small), (40, large)])))
    left, core, right = (found[Difference(Key(0), part)] for part in Difference.parts)
    assert left.shape == (3, BLOCK_ROWS, 3)
    assert core.shape == (2, 4, 3, 3)
    assert right.shape == (2, 3, 8)
    for index, (entry, rank, contexts) in enumerate(((small, 2, 4), (large, 3, 2))):
        names = part_names(Key(0))
        first = index * BLOCK_ROWS
        length = len(entry.tensors[names[0]])
        own = left.flatten(0, 1)[first : first + length]
        assert torch.equal(own[:, :rank], entry.tensors[names[0]])
        assert torch.equal(core[index, :contexts, :rank, :rank], entry.tensors[names[1]])
        assert torch.equal(right[index, :rank], entry.tensors[names[2]])
    for part, table in zip(part_names(Key(0)), (left, core, right), strict=True):  # the rest is 0
        held = sum(int(entry.tensors[part].count_nonzero()) for entry in (small, large))
        assert int(table.count_nonzero()) == held


def test_one_short_donor_is_padded_to_two_entries() -> None:
    found = tables(request((0, [(20, donor(5, rank=2))])))
    assert found[LeftDonor()].tolist() == [0, 0]
    for part in Difference.parts:
        assert len(found[Difference(Value(0), part)]) == LEAST_ENTRIES


def test_samples_have_rows_of_their_own() -> None:
    """The same picture in two samples has weights of its own in each."""
    shared = donor(5, rank=2)
    found = tables(request((0, [(20, shared)]), (7, [(30, shared)])))
    rows, left = found[DonorRow()], found[LeftRow()]
    assert rows.shape == (2, 400)
    assert rows[0, 20:25].tolist() == [0, 1, 2, 3, 4]
    assert rows[1, 30:35].tolist() == [12, 13, 14, 15, 16]
    assert left[1, 30].item() == BLOCK_ROWS
    assert found[LeftDonor()].tolist() == [0, 1]


def test_a_slot_without_differences_gets_zeros() -> None:
    entry = donor(5, rank=2)
    tensors = {name: tensor for name, tensor in entry.tensors.items() if not name.startswith("0.v.")}
    found = tables(request((0, [(20, Entry(tensors, entry.info))])))
    for part in Difference.parts:
        assert not found[Difference(Value(0), part)].any()
        assert found[Difference(Key(0), part)].any()


def test_tensors_that_still_arrive_are_read_when_their_layer_runs() -> None:
    entry, read = donor(5, rank=2), []
    waits = {name: lambda name=name: read.append(name) for name in entry.tensors}
    late = Entry.pending(entry.tensors, entry.info, waits, "file")
    found = tables(request((0, [(20, late)])))
    assert not read
    table = found[Difference(Key(0), "left")]
    assert isinstance(table, PendingTensor)
    assert torch.equal(table.get()[0, :5], entry.tensors["0.k.left"])
    assert read == ["0.k.left"]
