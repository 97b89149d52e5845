"""Smaller donors: rows of media items in int8 or float8, with their scales beside them.

Keys have one scale per channel over the tokens of the donor, because some channels are far larger than
others; values and residuals have one per token (and head, where heads are a dimension of their own). After
KIVI, arXiv 2402.02750, which found this for KV caches. Keys in int8 also have an offset per channel: biases
move channels away from zero. A donor's tensors are then::

    0.k  int8 [1, heads, tokens, width]    0.k.scale, 0.k.offset  [1, heads, 1, width]
    0.v  int8 [1, heads, tokens, width]    0.v.scale              [1, heads, tokens, 1]

Scales and offsets have the dtype of the graph's rows, and rows are rounded with them as stored: unpacking is
one multiplication, and adds no error but its own rounding. Rows that cannot be packed (NaN, infinite, or
above half of the largest number) keep their dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlcache_fx.errors import OptionError
from vlcache_fx.spec.decoder import RowSpec
from vlcache_fx.spec.slots import Difference, Key, StoredSlot
from vlcache_fx.store.entry import Entry

MODEL = "model"
"""The value of the option ``donor_dtype`` for rows as the graph computes them."""

PACKED = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
"""The other values of the option, and the dtypes of their rows."""

SCALE, OFFSET = "scale", "offset"
FLOAT8_CAPABILITY = (8, 9)
"""First compute capability of NVIDIA GPUs that converts float8 in hardware."""


def check_device(donor_dtype: str, device: torch.device) -> None:
    """Check that donors of this dtype can be used on a device.

    Raises:
        OptionError: ``"float8"`` on a device that does not convert it in hardware.
    """
    if donor_dtype != "float8":
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        major, minor = FLOAT8_CAPABILITY
        raise OptionError(
            f"option donor_dtype='float8' needs an NVIDIA GPU of compute capability {major}.{minor} or "
            f"later, and the model is on {device}; use 'int8' or 'model'"
        )


@dataclass(frozen=True)
class Packing:
    """Packs rows for donors.

    Attributes:
        donor_dtype: ``"int8"`` or ``"float8"``.
        specs: the slots of the rows.
    """

    donor_dtype: str
    specs: Mapping[StoredSlot, RowSpec]

    @classmethod
    def of(cls, donor_dtype: str, specs: Mapping[StoredSlot, RowSpec]) -> "Packing | None":
        """Return the packing of a value of the option; None for ``"model"``."""
        return None if donor_dtype == MODEL else cls(donor_dtype, specs)

    def pack(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a donor: packed rows, with scales and offsets beside them.

        An unpacked element is off by half of its scale at most (int8), or by one part in 16 (float8, where
        not next to zero), besides its rounding to the graph's dtype.

        Args:
            rows: rows of each slot; strides do not matter.
        """
        dtype = PACKED[self.donor_dtype]
        with torch.no_grad():
            ranges = {
                slot: _range(rows[str(slot)], _dim(slot, spec), _has_offset(slot, dtype))
                for slot, spec in self.specs.items()
            }
            sizes = [
                (torch.maximum(-low, high).amax() / torch.finfo(rows[str(slot)].dtype).max).double()
                for slot, (low, high) in ranges.items()
            ]
            packable = (torch.stack(sizes) < 0.5).tolist()  # False for NaN; waits for a GPU once
            found: dict[str, Tensor] = {}
            for slot, is_packable in zip(self.specs, packable, strict=True):
                own = rows[str(slot)]
                found |= _packed(slot, own, ranges[slot], dtype) if is_packable else {str(slot): own.clone()}
            states = set(rows) - {str(slot) for slot in self.specs}  # of recurrent layers: as they are
            found |= {name: rows[name].clone() for name in sorted(states)}
        return found


def length_of(entry: Entry) -> int:
    """Return the number of rows of a donor."""
    length = entry.info["length"]
    assert isinstance(length, int)
    return length


def slots_of(entry: Entry) -> set[str]:
    """Return the names of the slots of a donor."""
    beside = (SCALE, OFFSET, *Difference.parts)
    return {name for name in entry.tensors if name.rpartition(".")[2] not in beside}


def parts_of(entry: Entry, name: str) -> tuple[str, ...]:
    """Return the names of a slot's tensors: its rows, then their scale and offset, if they are packed."""
    beside = (f"{name}.{SCALE}", f"{name}.{OFFSET}")
    return (name, *(part for part in beside if part in entry.tensors))


def are_complete(entry: Entry, slot: StoredSlot, spec: RowSpec) -> bool:
    """Return True if rows have the graph's dtype, or are packed with the scales that belong to them."""
    name, rows = str(slot), entry.peek(str(slot))
    own = getattr(torch, spec.dtype)
    beside = [entry.peek(part) for part in parts_of(entry, name)[1:]]
    if rows.dtype == own:
        return not beside
    if rows.dtype not in PACKED.values() or f"{name}.{SCALE}" not in entry.tensors:
        return False
    sizes = list(rows.shape)
    sizes[_dim(slot, spec)] = 1
    offset_is_due = _has_offset(slot, rows.dtype)
    return len(beside) == 1 + offset_is_due and all(
        part.dtype == own and list(part.shape) == sizes for part in beside
    )


def unpacked(rows: Tensor, *beside: Tensor) -> Tensor:
    """Return rows in the graph's dtype; rows that are not packed as they are.

    Args:
        rows: a slot's rows.
        *beside: their scale and offset, as far as they have them; see ``parts_of``.
    """
    if not beside:
        return rows
    scale, *offset = beside
    with torch.no_grad():
        found = rows.to(scale.dtype)
        return torch.addcmul(offset[0], found, scale, out=found) if offset else found.mul_(scale)


def rows_of(entry: Entry, name: str) -> Tensor:
    """Return a slot's rows in the graph's dtype."""
    return unpacked(*(entry.tensors[part] for part in parts_of(entry, name)))


def dtype_of(entry: Entry, name: str) -> torch.dtype:
    """Return the graph's dtype of a slot's rows."""
    return entry.peek(parts_of(entry, name)[-1]).dtype


def is_packed(entry: Entry) -> bool:
    """Return True if a donor was made with another ``donor_dtype`` than ``"model"``: it is exact nowhere."""
    return entry.info.get("donor_dtype", MODEL) != MODEL


def _has_offset(slot: StoredSlot, dtype: torch.dtype) -> bool:
    return isinstance(slot, Key) and dtype == torch.int8


def _dim(slot: StoredSlot, spec: RowSpec) -> int:
    """Return the dimension that shares a scale: that of tokens for keys, the last other one for the rest."""
    last = len(spec.sizes) - 1
    return spec.dim if isinstance(slot, Key) else last - (spec.dim == last)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _range(rows: Tensor, dim: int, has_offset: bool) -> tuple[Tensor, Tensor]:
    low, high = (_wide(bound) for bound in torch.aminmax(rows, dim=dim, keepdim=True))
    if has_offset:
        return low, high
    most = torch.maximum(-low, high)
    return -most, most


def _packed(
    slot: StoredSlot, rows: Tensor, bounds: tuple[Tensor, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    (low, high), wide, own = bounds, _wide(rows), rows.dtype
    beside: dict[str, Tensor] = {}
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    if _has_offset(slot, dtype):
        offset = (low / 2 + high / 2).to(own)
        beside[f"{slot}.{OFFSET}"] = offset
        wide, low, high = (value - offset.to(wide.dtype) for value in (wide, low, high))
    # Rounded up, so that no element lies outside.
    slack = 1 + torch.finfo(own).eps + 4 * torch.finfo(wide.dtype).eps
    scale = (torch.maximum(-low, high) / largest * slack).to(own).clamp(min=torch.finfo(own).tiny)
    scaled = wide / scale.to(wide.dtype)
    if dtype == torch.int8:
        scaled = scaled.round()
    return {str(slot): scaled.clamp(-largest, largest).to(dtype), f"{slot}.{SCALE}": scale, **beside}
