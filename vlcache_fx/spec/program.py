"""Specs of programs, encoders and merges."""

from __future__ import annotations

from dataclasses import dataclass

from vlcache_fx.spec.slots import InputSlot, StoredSlot


@dataclass(frozen=True)
class ProgramSpec:
    """Spec of a cold or warm program.

    Attributes:
        slots: the inputs that passes added after the graph's own, in order.
        recorded: the stored slots of the last results, in order.
        in_place: indices of the graph's inputs that the program writes to itself.
    """

    slots: tuple[InputSlot, ...]
    recorded: tuple[StoredSlot, ...]
    in_place: tuple[int, ...] = ()


@dataclass(frozen=True)
class EncoderSpec:
    """Spec of an encoder, for the keys of its results.

    Attributes:
        inputs: indices of the inputs on which results depend.
        weights: indices of the weights on which results depend.
        computations: per result, a digest of how it is computed. Each result has its own entry: graphs of
            one model may return different results, or the same results in another order.
    """

    inputs: tuple[int, ...]
    weights: tuple[int, ...]
    computations: tuple[str, ...]


@dataclass(frozen=True)
class MergeSpec:
    """Spec of a graph with a merge and without attention.

    Attributes:
        output: output index of the merged embeddings, [batch, tokens, hidden].
    """

    output: int
