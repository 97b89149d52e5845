"""Spec of a decoder graph: facts that hold for all of its calls. Indices are input indices unless noted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import Tensor

from vlcache_fx.plan.selection import RowSelection
from vlcache_fx.spec.mutations import Write
from vlcache_fx.spec.slots import StoredSlot


@dataclass(frozen=True)
class RowSpec:
    """Rows of one donor slot, as programs read and record them.

    Attributes:
        dim: the dimension of rows.
        dtype: dtype of the rows, such as ``float32``.
        sizes: size of each dimension; None for ``dim`` and for dynamic sizes.
        batch_dim: the dimension of samples; None for a single sample. Its size is 1 in the store.
    """

    dim: int
    dtype: str
    sizes: tuple[int | None, ...]
    batch_dim: int | None = None


@dataclass(frozen=True)
class StateSpec:
    """What donors store of one operator that carries a state from token to token.

    Attributes:
        slot: ``Inputs`` of a convolution, or ``Matrix``, ``Factor`` or ``Term`` of a recurrence.
        dtype: dtype of the stored tensor.
        sizes: its sizes; None for the number of maps.
    """

    slot: StoredSlot
    dtype: str
    sizes: tuple[int | None, ...]


@dataclass(frozen=True)
class InputValueSpec:
    """A value of a call on which stored rows depend; it enters keys.

    Attributes:
        input: index of the input; None for the next value of the program ``input_values``.
        token_dim: the dimension of tokens; None without one. It may begin with tokens of a cache. Found when
            the graph is compiled, never guessed from the sizes of a call.
        batch_dim: the dimension of samples; None for a single sample.
        is_index: integers index an embedding table, as token ids do; otherwise they are positions.
        is_beside: layers read the value directly, not only through the residual stream.
        group: values of one group may be equal: the graph computes them in the same way.
    """

    input: int | None
    token_dim: int | None
    batch_dim: int | None = None
    is_index: bool = False
    is_beside: bool = True
    group: int = 0


@dataclass(frozen=True)
class Digests:
    """Digests of how rows are computed, for keys.

    Attributes:
        separate: for calls in which values of one group differ.
        unified: for calls in which they are equal; independent of how often the graph computes the value.
            Example: positions of queries and of keys, which are equal unless a cache comes first.
    """

    separate: str
    unified: str


@dataclass(frozen=True)
class SpanSpec:
    """Inputs from which media spans are found.

    Attributes:
        features: the inputs with feature rows, one per merge and then one per deepstack add; in the order of
            the masks that the program ``spans`` returns.
        num_merges: number of merges.
        embeddings: the input embeddings in which spans may be marked; None where the graph merges.
        width: width of merged features; None without a merge, or where it is dynamic.
    """

    features: tuple[int, ...]
    num_merges: int
    embeddings: int | None = None
    width: int | None = None


class MoveKind(StrEnum):
    """A step of keys through a KV cache."""

    JOIN = "join"
    """Concatenated with other keys."""
    WRITE = "write"
    """Written into a buffer at given positions."""
    CUT = "cut"
    """Sliced."""


@dataclass(frozen=True)
class CacheValue:
    """A value of the program ``cache_values``, by its index."""

    index: int


@dataclass(frozen=True)
class KeyMove:
    """One step of a call's keys through a KV cache, before attention.

    Attributes:
        kind: kind of the step.
        dim: the dimension of keys.
        operands: JOIN: the parts in order, None for the call's keys. WRITE: the buffer and the positions.
            CUT: start, end and step of the slice.
    """

    kind: MoveKind
    dim: int
    operands: tuple[CacheValue | int | None, ...]


@dataclass(frozen=True)
class MaskSite:
    """Attention sites that share a mask, which is checked in every call.

    Attributes:
        node, source_line: name and source of the first site, for refusals.
        has_mask: False for ``is_causal`` attention.
        rule: parameters of the mask, such as the width of a window; empty without any.
        key_moves: steps from the call's keys to the attention's keys; empty where they are equal.
    """

    node: str
    source_line: str | None
    has_mask: bool
    rule: str = ""
    key_moves: tuple[KeyMove, ...] = ()


@dataclass(frozen=True)
class MaskSpec:
    """The attention masks of a graph.

    Attributes:
        sites: sites to check, one per mask. The program ``masks`` returns the masks of those with
            ``has_mask``, in this order.
        inputs: the inputs on which masks depend.
        every_layer_has_one: False where some layer has no mask.
        site_of_layer: per layer, its index in ``sites``; None where no check is needed.
    """

    sites: tuple[MaskSite, ...]
    inputs: tuple[int, ...]
    every_layer_has_one: bool
    site_of_layer: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class DecoderSpec:
    """Static description of a decoder graph and its programs.

    Attributes:
        num_layers: number of layers, L.
        layer_groups: sizes of groups of consecutive layers that compute the same rows; empty where each layer
            may have its own rows.
        num_outputs: number of the graph's outputs, those for input mutations included.
        num_results: number of results of the traced code.
        writes: input mutations.
        data: inputs that are tensors of the request.
        host_inputs: integer and bool inputs among ``data``, copied to the CPU because keys are computed from
            them: token ids, positions, masks.
        tail: tokens that results need; None for all.
        tail_varies: programs take any number of such tokens, two or more.
        has_past: keys of earlier calls may precede those of the call.
        rows: rows of each donor slot, in the order of layers.
        layout: text for the dtypes and widths of stored rows, equal for graphs of one model. Part of keys.
        computation: digests of how rows are computed. Part of keys.
        weights: inputs that are weights of the decoder's layers.
        other_weights: inputs that are other weights on which rows depend: token embeddings.
        model_fingerprint: fingerprint of the layers' weights where they are not inputs; else None.
        spans: inputs from which media spans are found.
        leaves: the other values that enter keys.
        masks: attention masks.
        states: states of recurrent layers, in the order of layers; empty without such layers.
        reads_states: the call continues states that are inputs of the graph.
        most_inputs: per input with earlier inputs of a convolution, its index, their dimension, and their
            largest number: those that the convolution reads.
    """

    num_layers: int
    layer_groups: tuple[int, ...]
    num_outputs: int
    num_results: int
    writes: tuple[Write, ...]
    data: tuple[int, ...]
    host_inputs: tuple[int, ...]
    tail: RowSelection | None
    tail_varies: bool
    has_past: bool
    rows: dict[StoredSlot, RowSpec]
    layout: str
    computation: Digests
    weights: tuple[int, ...]
    other_weights: tuple[int, ...]
    model_fingerprint: str | None
    spans: SpanSpec
    leaves: tuple[InputValueSpec, ...]
    masks: MaskSpec
    states: tuple[StateSpec, ...] = ()
    reads_states: bool = False
    most_inputs: tuple[tuple[int, int, int], ...] = ()

    @property
    def continues_prompts(self) -> bool:
        """True where calls continue a prompt: their keys follow those of a growing cache.

        False for a static cache, to which a first prompt is written in the same way.
        """
        return self.has_past and not self.writes

    @property
    def dtype(self) -> str:
        """Dtype of stored rows, as in profiles."""
        return next(iter(self.rows.values())).dtype

    def positions(self, num_tokens: int, args: Sequence[Any] = ()) -> Tensor | None:
        """Return the positions that results need, int64 [n], or None for all; see ``RowSelection``."""
        return None if self.tail is None else self.tail.positions(num_tokens, args)
