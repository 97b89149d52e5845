"""What the runtime must know of a decoder beside its programs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.analysis.decoder.computation import Digests, computation_of
from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.ir import Captured, InputKind, Write
from vlcache_fx.plan.selection import RowSelection
from vlcache_fx.runtime.donors.tables import RowForm
from vlcache_fx.runtime.requests.blocks import PrefixReader
from vlcache_fx.runtime.requests.input_values import Leaves
from vlcache_fx.runtime.requests.on_cpu import is_whole
from vlcache_fx.runtime.requests.spans import Identifier
from vlcache_fx.spec.slots import Residual, StoredSlot


@dataclass(frozen=True)
class DecoderForm:
    """Facts of one decoder graph that hold for every call: plain data, but for the identifier's masks.

    Indices are those of the graph's inputs.

    Attributes:
        num_layers: L.
        num_outputs: entries that the graph returns, those for writes included.
        num_results: entries that the traced code returns.
        writes: what the traced code writes to its inputs.
        data: inputs that are tensors of the request.
        tells: those of them that hold whole numbers, as token ids, positions and masks do: keys are made of
            them, so they are read on the CPU.
        device: where the token embeddings are.
        tail: tokens that results need; None for all.
        rows: what programs read from each slot.
        layout: text of what a stored row looks like; graphs of one model agree on it. Part of the keys.
        computation: how rows are computed: see ``analysis.computation.Computation``.
        weights: inputs that are weights of the decoder's layers.
        other_weights: inputs that are other weights on which rows depend, those of token embeddings.
        model_fingerprint: of the layers' weights, where they are no inputs; else None.
        identifier: finds spans and their keys.
        leaves: reads the other values that keys hold.
        prefixes: cuts prompts into pieces.
        groups: number of layers in each run of layers that compute the same rows; empty where each layer may
            have its own.
        tail_varies: True where programs take any number of tokens that results need, from two on.
        has_past: True where the keys of the call may be joined with those of earlier calls.
    """

    num_layers: int
    num_outputs: int
    num_results: int
    writes: tuple[Write, ...]
    data: tuple[int, ...]
    tells: tuple[int, ...]
    device: torch.device
    tail: RowSelection | None
    rows: Mapping[StoredSlot, RowForm]
    layout: str
    computation: Digests
    weights: tuple[int, ...]
    model_fingerprint: str | None
    identifier: Identifier
    leaves: Leaves
    prefixes: PrefixReader
    other_weights: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    tail_varies: bool = False
    has_past: bool = False

    @classmethod
    def of(
        cls,
        captured: Captured,
        facts: DecoderFacts,
        slots: Sequence[StoredSlot],
        groups: tuple[int, ...] = (),
    ) -> "DecoderForm":
        """Of a captured graph; ``slots`` are what its programs record."""
        data = captured.indices_of(InputKind.DATA)
        place = {node: index for index, node in enumerate(captured.placeholders)}
        identifier = Identifier.of(captured.graph_module, facts, data)
        frontiers: dict[StoredSlot, tuple[Node, int]] = {
            Residual(): (facts.stream.boundaries[-1], facts.tail_rows.axis)
        }
        frontiers |= {one.slot: (one.node, one.dim) for one in facts.frontiers}
        batch = facts.batch_dims or {}
        rows = {slot: frontiers[slot][0] for slot in slots if slot != Residual()}
        computation = computation_of(captured, facts)
        leaves = Leaves.of(captured, computation.leaves)
        return cls(
            num_layers=facts.num_layers,
            num_outputs=captured.num_outputs,
            num_results=captured.num_results,
            writes=captured.writes,
            data=data,
            tells=tuple(index for index in data if is_whole(captured.placeholders[index])),
            device=facts.stream.boundaries[0].meta["val"].device,
            tail=facts.tail_rows.rule,
            rows={
                slot: RowForm.of(
                    frontiers[slot][0].meta["val"], frontiers[slot][1], batch.get(frontiers[slot][0])
                )
                for slot in slots
            },
            layout=str(
                [
                    (str(slot), str(node.meta["val"].dtype), str(shape_of(node)[-1]))
                    for slot, node in rows.items()
                ]
            ),
            computation=computation.digests,
            weights=tuple(place[node] for node in facts.weights),
            other_weights=tuple(place[node] for node in computation.weights),
            model_fingerprint=None,
            identifier=identifier,
            leaves=leaves,
            prefixes=PrefixReader(identifier.embeddings),
            groups=groups,
            tail_varies=facts.tail_rows.varies,
            has_past=bool(facts.past),
        )

    @property
    def goes_on(self) -> bool:
        """True where calls continue a prompt: what their keys are joined with, a growing cache holds already.

        A cache of fixed size does not tell: a first prompt is written to it in the same way.
        """
        return self.has_past and not self.writes

    @property
    def dtype(self) -> str:
        """Of stored rows, as profiles name it."""
        return str(next(iter(self.rows.values())).dtype).removeprefix("torch.")

    def positions(self, num_tokens: int, args: Sequence[Any] = ()) -> Tensor | None:
        """Absolute positions that results need, int64 [n], or None for all (see ``RowSelection``)."""
        return None if self.tail is None else self.tail.positions(num_tokens, args)
