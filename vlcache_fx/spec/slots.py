"""Slots: names of the inputs that passes add to programs, and of the rows that donors store.

A decoder of L layers has levels 0 to L: level l < L is the input of layer l, level L the output of the last
layer. N tokens, n(l) active rows at level l, s tokens that results need, D donor rows of all reused spans.
Index tensors are int64; in a program of several samples they begin with a batch dimension.

==================  ==============  ==================  ===================================================
slot                name            shape               content
==================  ==============  ==================  ===================================================
``Rows(l)``         ``rows.3``      [n(l)]              active token positions of level l, sorted
``Keep(l)``         ``keep.3``      [n(l + 1)]          indices of level l + 1's rows within level l's
``Positions(a, b)`` ``place.1.3``   [n(b)]              indices of level b's rows within level a's
``Source(l)``       ``source.3``    [N]                 per token donor row v >= 0, or computed row -(v + 1)
``Results()``       ``results``     [s]                 indices of results' tokens within level L's rows
``Donor(stored)``   ``donor.3.k``   as stored, D rows   the donor table of a stored slot
``Packed(...)``      ``packed.``...  as in the donor     rows, scale or offset of a packed donor
``Difference(...)``  ``difference``.. see ``ops.fit``     left, core or right of the donors' differences
``DonorRow()``      ``donor_row``   [N]                 per token its row in the donor table
``LeftRow()``       ``left_row``    [N]                 per token its row in ``left``; -1 for none
``LeftDonor()``     ``left_donor``  [blocks of left]    the donor of each block
``Key(l)``          ``3.k``         as in the graph     keys of layer l, before positions enter
``Value(l)``        ``3.v``         as in the graph     values of layer l
``Residual()``      ``residual``    [1, rows, hidden]   output of the last layer
``Inputs(l, i)``    ``3.inputs.0``  [1, channels, W]    last inputs of convolution i of layer l
``Matrix(l, i)``    ``3.matrix.0``  [heads, k, v]       state of recurrence i of layer l
``Factor(l, i)``    ``3.factor.0``  [m, heads, k, k]    A of m maps ``state -> A state + B``
``Term(l, i)``      ``3.term.0``    [m, heads, k, v]    B of these maps
==================  ==============  ==================  ===================================================

Recurrent decoders have more inputs; ``plan.jumps`` explains their jumps and records. T tails of W rows,
j jumps, p records, b samples:

==================  ================  ================  ===================================================
slot                name              shape             content
==================  ================  ================  ===================================================
``JumpAt()``        ``jump_at``       [b, j]            computed rows before each jump
``JumpMap()``       ``jump_map``      [b, j]            entry of ``Factor`` and ``Term``; -1 for no jump
``NumRows()``       ``num_rows``      [b]               rows of each sample; later ones are padding
``Joined(W)``       ``joined.4``      [n + T W]         per row of a convolution's input: as in ``Source``
``Own(l, W)``       ``own.3.4``       [n(l)]            indices of the computed rows in this input
``RecordStart()``   ``record_start``  [b, p]            computed rows before each record
``RecordEnd()``     ``record_end``    [b, p]            computed rows before the end of each record
``Last(W)``         ``last.4``        [p W]             indices of the last W rows of each record in the
                                                        convolution's input behind W rows of zeros
==================  ================  ================  ===================================================

All up to ``LeftDonor``, and those of the second table, are inputs (``InputSlot``). ``cold_program`` and
``warm_program`` add ``Rows``; passes add the others: ``restrict_rows`` and ``kv_only_rows`` add ``Keep``,
``gather_cross_layer_values`` ``Positions``, ``splice_rows`` ``Source``, ``trim_tail`` ``Results``,
``hoist_lookups`` ``Donor``, ``carry_states`` and ``record_states`` those of the second table.
``declare_inputs`` declares their sizes, and ``runtime.programs.bind`` makes their values, from a plan and
donor tables. In programs for a packed donor, ``unpack_donors`` replaces ``Donor`` by ``Packed``, such as
``packed.3.k.rows``, ``packed.3.k.scale`` and ``packed.3.k.offset``. In programs that fit donors,
``fit_donors`` adds ``DonorRow``, ``LeftRow``, ``LeftDonor`` and ``Difference``, such as
``difference.3.k.left``.

The last seven of the first table are stored (``StoredSlot``), in the dtype of the graph. ``record_donors``
appends them to a program's results; a donor has a tensor under each name. Stores and manifests contain the
names, so they never change.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from vlcache_fx.errors import SlotError


@dataclass(frozen=True)
class Slot:
    """Base class. ``str(slot)`` is the name; ``parse`` is its inverse."""

    kind: ClassVar[str]

    def __str__(self) -> str:
        """Return the name: the kind, then the fields, joined by dots."""
        return ".".join([self.kind, *(str(getattr(self, field.name)) for field in fields(self))])

    @classmethod
    def parse(cls, name: str) -> Self:
        """Return the slot of a name; on a subclass, only a slot of that kind.

        Raises:
            SlotError: ``name`` is not the name of such a slot.
        """
        try:
            slot = _read(name)
        except ValueError as error:
            raise SlotError(f"{name!r} is not the name of a slot") from error
        if str(slot) != name:  # such as "rows.03"
            raise SlotError(f"{name!r} is not the name of a slot; {str(slot)!r} is")
        if not isinstance(slot, cls):
            raise SlotError(f"slot {name!r} is {type(slot).__name__}, not {cls.__name__}")
        return slot

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Serialize slots as their names, in manifests."""
        from pydantic_core import core_schema  # imported here: only exports need it

        def read(name: Any) -> Slot:
            try:
                return cls.parse(str(name))
            except SlotError as error:
                raise ValueError(str(error)) from error

        return core_schema.no_info_plain_validator_function(
            read, serialization=core_schema.to_string_ser_schema()
        )


class InputSlot(Slot):
    """An input that passes add to a program."""


class StoredSlot(Slot):
    """Rows that a program records and a donor stores."""


@dataclass(frozen=True)
class Rows(InputSlot):
    """Active token positions of a level."""

    level: int
    kind: ClassVar[str] = "rows"

    @property
    def row_level(self) -> int:
        """The level whose rows have an entry each."""
        return self.level


@dataclass(frozen=True)
class Keep(InputSlot):
    """Indices of the next level's rows within those of ``level``."""

    level: int
    kind: ClassVar[str] = "keep"

    @property
    def row_level(self) -> int:
        """The level whose rows have an entry each."""
        return self.level + 1


@dataclass(frozen=True)
class Positions(InputSlot):
    """Indices of the rows of level ``read_at`` within those of an earlier level ``made_at``."""

    made_at: int
    read_at: int
    kind: ClassVar[str] = "place"

    @property
    def row_level(self) -> int:
        """The level whose rows have an entry each."""
        return self.read_at


@dataclass(frozen=True)
class Source(InputSlot):
    """Per token, its donor row or computed row at ``level``: see ``plan.Plan.source``."""

    level: int
    kind: ClassVar[str] = "source"


@dataclass(frozen=True)
class Results(InputSlot):
    """Indices of the results' tokens within the rows of the last level."""

    kind: ClassVar[str] = "results"


@dataclass(frozen=True)
class JumpAt(InputSlot):
    """Computed rows before each jump."""

    kind: ClassVar[str] = "jump_at"


@dataclass(frozen=True)
class JumpMap(InputSlot):
    """Per jump, the index of its map; -1 for none."""

    kind: ClassVar[str] = "jump_map"


@dataclass(frozen=True)
class NumRows(InputSlot):
    """Per sample of a batch, its computed rows; later ones are padding."""

    kind: ClassVar[str] = "num_rows"


@dataclass(frozen=True)
class RecordStart(InputSlot):
    """Computed rows before each record."""

    kind: ClassVar[str] = "record_start"


@dataclass(frozen=True)
class RecordEnd(InputSlot):
    """Computed rows before the end of each record."""

    kind: ClassVar[str] = "record_end"


@dataclass(frozen=True)
class Joined(InputSlot):
    """Per row of a convolution's input, a stored input or a computed row, as in ``Source``."""

    width: int
    kind: ClassVar[str] = "joined"


@dataclass(frozen=True)
class Last(InputSlot):
    """Indices of the last inputs of each record."""

    width: int
    kind: ClassVar[str] = "last"


@dataclass(frozen=True)
class Own(InputSlot):
    """Indices of the computed rows in a convolution's input."""

    level: int
    width: int
    kind: ClassVar[str] = "own"

    @property
    def row_level(self) -> int:
        """The level whose rows have an entry each."""
        return self.level


@dataclass(frozen=True)
class Donor(InputSlot):
    """The donor table of a stored slot."""

    stored: StoredSlot
    kind: ClassVar[str] = "donor"


@dataclass(frozen=True)
class Packed(InputSlot):
    """A tensor of a stored slot in a packed donor: its ``rows``, or their ``scale`` or ``offset``."""

    stored: StoredSlot
    part: str
    kind: ClassVar[str] = "packed"
    parts: ClassVar[tuple[str, ...]] = ("rows", "scale", "offset")


@dataclass(frozen=True)
class Difference(InputSlot):
    """The differences of donors' contexts from their mean: their ``left``, ``core`` or ``right`` factor."""

    stored: StoredSlot
    part: str
    kind: ClassVar[str] = "difference"
    parts: ClassVar[tuple[str, ...]] = ("left", "core", "right")


@dataclass(frozen=True)
class DonorRow(InputSlot):
    """Per token of a donor with differences, its row in the donor table, recomputed or not."""

    kind: ClassVar[str] = "donor_row"


@dataclass(frozen=True)
class LeftRow(InputSlot):
    """Per token of a donor with differences, its row in their left factors; -1 for other tokens."""

    kind: ClassVar[str] = "left_row"


@dataclass(frozen=True)
class LeftDonor(InputSlot):
    """The donor of each block of the left factors."""

    kind: ClassVar[str] = "left_donor"


@dataclass(frozen=True)
class _LayerRows(StoredSlot):
    layer: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind}"


class Key(_LayerRows):
    """Keys of a layer, before positions enter."""

    kind: ClassVar[str] = "k"


class Value(_LayerRows):
    """Values of a layer."""

    kind: ClassVar[str] = "v"


@dataclass(frozen=True)
class _Carried(StoredSlot):
    layer: int
    index: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind}.{self.index}"


class Inputs(_Carried):
    """The last inputs of a convolution."""

    kind: ClassVar[str] = "inputs"


class Matrix(_Carried):
    """The state of a recurrence after a token."""

    kind: ClassVar[str] = "matrix"


class Factor(_Carried):
    """Factors of the maps that tokens of a media item make of a recurrence's state."""

    kind: ClassVar[str] = "factor"


class Term(_Carried):
    """Terms of the maps that tokens of a media item make of a recurrence's state."""

    kind: ClassVar[str] = "term"


class Residual(StoredSlot):
    """Output of the last layer; stored where results need all rows."""

    kind: ClassVar[str] = "residual"


_PLAIN: dict[str, type[InputSlot]] = {
    slot.kind: slot
    for slot in (JumpAt, JumpMap, NumRows, RecordStart, RecordEnd, DonorRow, LeftRow, LeftDonor)
}
_CARRIED: dict[str, type[_Carried]] = {slot.kind: slot for slot in (Inputs, Matrix, Factor, Term)}


def _read(name: str) -> Slot:
    """Return the slot of ``name``, with leading zeros allowed; raises ValueError for anything else."""
    match name.split("."):
        case ["rows", level]:
            return Rows(_number(level))
        case ["keep", level]:
            return Keep(_number(level))
        case ["place", made_at, read_at]:
            return Positions(_number(made_at), _number(read_at))
        case ["source", level]:
            return Source(_number(level))
        case ["results"]:
            return Results()
        case [name] if name in _PLAIN:
            return _PLAIN[name]()
        case ["joined", width]:
            return Joined(_number(width))
        case ["last", width]:
            return Last(_number(width))
        case ["own", level, width]:
            return Own(_number(level), _number(width))
        case ["residual"]:
            return Residual()
        case ["donor", *stored]:
            return Donor(StoredSlot.parse(".".join(stored)))
        case ["packed", *stored, part] if part in Packed.parts:
            return Packed(StoredSlot.parse(".".join(stored)), part)
        case ["difference", *stored, part] if part in Difference.parts:
            return Difference(StoredSlot.parse(".".join(stored)), part)
        case [layer, kind, index] if kind in _CARRIED:
            return _CARRIED[kind](_number(layer), _number(index))
        case [layer, "k"]:
            return Key(_number(layer))
        case [layer, "v"]:
            return Value(_number(layer))
    raise ValueError(name)


def _number(text: str) -> int:
    if not text.isdecimal():  # int() takes signs, spaces and underscores
        raise ValueError(text)
    return int(text)
