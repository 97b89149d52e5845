"""A decoder: everything that holds for each of its calls. Indices are those of its inputs unless noted."""

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
        dim: the dimension that runs over rows.
        dtype: of the values, as ``float32``.
        sizes: of every dimension; None for rows, and where the graph leaves it open.
        batch_dim: the dimension that runs over samples in a program of several; 1 in what is stored.
    """

    dim: int
    dtype: str
    sizes: tuple[int | None, ...]
    batch_dim: int | None = None


@dataclass(frozen=True)
class InputValueSpec:
    """One value of the request that stored rows depend on; keys hold what it is in each call.

    Attributes:
        input: the input that it is; None for the next value of the program ``input_values``.
        token_dim: the dimension that runs over the call's tokens, or over a cache's and then these; None
            where there is none. Recorded when the graph is compiled, never guessed from a request's sizes.
        batch_dim: the dimension that runs over samples; None for a single sample.
        is_index: its values name rows of a table, as token ids do; otherwise whole numbers are positions.
        is_beside: layers read it beside the residual stream.
        group: leaves of one group may be one value that the graph makes several times.
    """

    input: int | None
    token_dim: int | None
    batch_dim: int | None = None
    is_index: bool = False
    is_beside: bool = True
    group: int = 0


@dataclass(frozen=True)
class Digests:
    """A computation as keys hold it.

    Attributes:
        separate: leaves are told apart by their numbers.
        unified: the same where leaves of one group have one value, however often the graph makes it: queries
            and keys may have positions of their own, which are the same unless keys of earlier calls join.
    """

    separate: str
    unified: str


@dataclass(frozen=True)
class SpanSpec:
    """Where media spans come from.

    Attributes:
        features: per merge and addition, the input that holds its feature rows, in the order of the masks
            that the program ``spans`` gives.
        num_merges: how many of these are merges; additions follow.
        embeddings: where there is no merge, the input whose rows may be marked as spans.
        width: values per token of what is merged; None where there is no merge, or the graph takes any.
    """

    features: tuple[int, ...]
    num_merges: int
    embeddings: int | None = None
    width: int | None = None


class MoveKind(StrEnum):
    """How keys of a call get among others."""

    JOIN = "join"
    """Concatenated with others."""
    WRITE = "write"
    """Written as rows into a buffer."""
    CUT = "cut"
    """Sliced."""


@dataclass(frozen=True)
class CacheValue:
    """A value of the program ``cache_values``, by its index."""

    index: int


@dataclass(frozen=True)
class KeyMove:
    """One step of a call's keys through a KV cache, on their way to the attention.

    Attributes:
        kind: of the step.
        dim: the dimension over keys of what they join.
        operands: JOIN: the parts in order, None for this call's keys. WRITE: the buffer, and the positions
            written. CUT: start, end and step as Python's brackets take them.
    """

    kind: MoveKind
    dim: int
    operands: tuple[CacheValue | int | None, ...]


@dataclass(frozen=True)
class MaskSite:
    """One kind of attention whose mask is looked at in every call.

    Attributes:
        node, source_line: for refusals: the name of the first such attention, and where it comes from.
        has_mask: False where it hides later tokens by itself.
        rule: its parameters, such as the width of a window; empty without.
        key_moves: from this call's keys to those that it attends to; empty where these are the same.
    """

    node: str
    source_line: str | None
    has_mask: bool
    rule: str = ""
    key_moves: tuple[KeyMove, ...] = ()


@dataclass(frozen=True)
class MaskSpec:
    """The attention masks.

    Attributes:
        sites: the kinds of attention that have to be looked at. The program ``masks`` gives the masks of
            those that have one, in this order.
        inputs: what masks depend on.
        every_layer_has_one: False where some layer shows no mask.
        site_of_layer: per layer, the index of its kind of attention among ``sites``; None where it need not
            be looked at.
    """

    sites: tuple[MaskSite, ...]
    inputs: tuple[int, ...]
    every_layer_has_one: bool
    site_of_layer: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder graph and its programs, as the runtime knows them.

    Attributes:
        num_layers: L.
        layer_groups: number of layers in each run of layers that compute the same rows; empty where each
            layer may have its own.
        num_outputs: entries that the graph returns, those for input mutations included.
        num_results: entries that the traced code returns.
        writes: its input mutations.
        data: inputs that are tensors of the request.
        host_inputs: those of them that are read on the CPU, because keys are made of them: whole numbers, as
            token ids, positions and masks are.
        tail: tokens that results need; None for all.
        tail_varies: True where programs take any number of tokens that results need, from two on.
        has_past: True where keys of the call may be joined with those of earlier calls.
        rows: what programs read from each donor slot, in the order of layers.
        layout: text of what a stored row looks like; graphs of one model agree on it. Part of keys.
        computation: how rows are computed. Part of keys.
        weights: inputs that are weights of the decoder's layers.
        other_weights: inputs that are other weights on which rows depend, those of token embeddings.
        model_fingerprint: of the layers' weights, where they are no inputs; else None.
        spans: where media spans come from.
        leaves: the other values that keys hold.
        masks: what tokens may see.
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

    @property
    def continues_prompts(self) -> bool:
        """True where calls continue a prompt: what their keys are joined with, a growing cache holds already.

        A cache of fixed size does not tell: a first prompt is written to it in the same way.
        """
        return self.has_past and not self.writes

    @property
    def dtype(self) -> str:
        """Of stored rows, as profiles name it."""
        return next(iter(self.rows.values())).dtype

    def positions(self, num_tokens: int, args: Sequence[Any] = ()) -> Tensor | None:
        """Absolute positions that results need, int64 [n], or None for all (see ``RowSelection``)."""
        return None if self.tail is None else self.tail.positions(num_tokens, args)
