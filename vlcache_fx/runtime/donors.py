"""Donors in and out of the store."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlcache_fx.lowering import Arriving
from vlcache_fx.plan.types import Span
from vlcache_fx.store.base import Store
from vlcache_fx.store.entry import Entry


@dataclass(frozen=True)
class RowForm:
    """What a program reads from one slot.

    Attributes:
        dim: the dimension that runs over rows.
        dtype: of its values.
        sizes: of every dimension; None for rows, and where the graph leaves it open.
    """

    dim: int
    dtype: torch.dtype
    sizes: tuple[int | None, ...]

    @classmethod
    def of(cls, value: Tensor, dim: int) -> "RowForm":
        """The form of rows of ``value``, a fake tensor of the graph."""
        sizes: list[int | None] = [size if isinstance(size, int) else None for size in value.shape]
        sizes[dim] = None
        return cls(dim, value.dtype, tuple(sizes))

    def fits(self, tensor: Tensor, length: int) -> bool:
        """True for ``length`` rows of this form."""
        return (
            tensor.dtype == self.dtype
            and tensor.dim() == len(self.sizes)
            and tensor.shape[self.dim] == length
            and all(want is None or size == want for size, want in zip(tensor.shape, self.sizes, strict=True))
        )


def tables(
    entries: Sequence[Entry], forms: Mapping[str, RowForm], device: torch.device
) -> dict[str, Tensor | Arriving]:
    """Donor tables per slot: the rows of all entries, one behind the other.

    A single donor is handed over as it lies in the store; several are joined. Donors of a host tier are
    brought in on a stream of their own, in the order of ``forms``, which is that of the layers, while earlier
    layers compute.
    """

    def table(slot: str, dim: int) -> Tensor:
        parts = [entry.tensors[slot].to(device, non_blocking=True) for entry in entries]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    if device.type != "cuda" or all(t.device == device for entry in entries for t in entry.tensors.values()):
        return {slot: table(slot, form.dim) for slot, form in forms.items()}
    made: dict[str, Tensor | Arriving] = {}
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    for slot, form in forms.items():
        with torch.cuda.stream(side):
            tensor, event = table(slot, form.dim), torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(side)
        tensor.record_stream(current)  # its memory was allocated for the side stream
        made[slot] = Arriving(tensor, functools.partial(current.wait_event, event))
    return made


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def fits(entry: Entry | None, forms: Mapping[str, RowForm], length: int) -> bool:
    """True where the entry has every slot that a program reads, with ``length`` rows of its form each."""
    return entry is not None and all(
        slot in entry.tensors and form.fits(entry.tensors[slot], length) for slot, form in forms.items()
    )


def admit(store: Store, span: Span, recorded: Mapping[str, Tensor], forms: Mapping[str, RowForm]) -> bool:
    """Store the rows of one span; False where the store refused them."""
    rows = {slot: recorded[slot].narrow(form.dim, span.start, span.length) for slot, form in forms.items()}
    return store.put(span.key, Entry(rows, {"kind": "donor", "length": span.length}))
