"""Programs and encoders: how they are called."""

from __future__ import annotations

from dataclasses import dataclass

from vlcache_fx.spec.slots import InputSlot, StoredSlot


@dataclass(frozen=True)
class ProgramSpec:
    """A cold or warm program of a decoder.

    Attributes:
        slots: the inputs that passes added, in order, after the graph's own.
        recorded: the stored slots that the last results are for, in order.
        in_place: indices of the graph's inputs that the program writes to by itself.
    """

    slots: tuple[InputSlot, ...]
    recorded: tuple[StoredSlot, ...]
    in_place: tuple[int, ...] = ()


@dataclass(frozen=True)
class EncoderSpec:
    """What an encoder's results depend on.

    Attributes:
        inputs: indices of the inputs whose content they depend on.
        weights: indices of the weights that they depend on.
        computations: per result, a digest of how it is computed from these. Graphs of one model can give
            different results, or the same results in another order; each is kept under its own digest.
    """

    inputs: tuple[int, ...]
    weights: tuple[int, ...]
    computations: tuple[str, ...]


@dataclass(frozen=True)
class MergeSpec:
    """A graph that merges and attends to nothing.

    Attributes:
        output: index, among its outputs, of the merged embeddings, [batch, tokens, hidden].
    """

    output: int
