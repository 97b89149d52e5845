"""Builds the spec and the prologue of a decoder graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from vlcache_fx.analysis import DecoderFacts
from vlcache_fx.analysis.decoder.computation import Computation, computation_of
from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.compiler.builders.input_values import computed_leaves, input_value_specs
from vlcache_fx.compiler.builders.masks import FoundMasks, find_masks
from vlcache_fx.compiler.builders.on_cpu import evaluated_on_cpu, is_integral
from vlcache_fx.compiler.builders.spans import span_masks, span_spec
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.ir.subgraph import extract
from vlcache_fx.plan.selection import RowSelection
from vlcache_fx.runtime.requests.prologue import Prologue, Values, no_values
from vlcache_fx.spec.decoder import DecoderSpec, RowSpec, StateSpec
from vlcache_fx.spec.slots import Factor, Residual, StoredSlot, Term


@dataclass(frozen=True)
class Decoder:
    """A decoder graph with its spec.

    Attributes:
        captured, facts: the graph and its analysis.
        spec: the spec.
        computation: digests of how rows are computed.
        masks: attention masks.
    """

    captured: Captured
    facts: DecoderFacts
    spec: DecoderSpec
    computation: Computation
    masks: FoundMasks

    @property
    def device(self) -> torch.device:
        """Device of the token embeddings."""
        device: torch.device = self.facts.stream.boundaries[0].meta["val"].device
        return device

    def prologue_nodes(self) -> PrologueNodes:
        """Return the nodes whose values each program of the prologue returns."""
        return PrologueNodes(
            spans=tuple(span_masks(self.facts)),
            masks=self.masks.masks,
            input_values=tuple(computed_leaves(self.computation.leaves)),
            cache_values=self.masks.cache_values,
        )

    def prologue(self) -> Prologue:
        """Return the programs, as parts of the captured graph; integers are computed on the CPU."""
        nodes, module = self.prologue_nodes(), self.captured.graph_module
        data = self.captured.indices_of(InputKind.DATA)

        def on_cpu(values: tuple[Node, ...]) -> Values:
            return evaluated_on_cpu(extract(module, values), data)[0] if values else no_values

        def on_device(values: tuple[Node, ...]) -> Values:
            return extract(module, values) if values else no_values

        return Prologue(
            spans=on_cpu(nodes.spans),
            masks=on_device(nodes.masks),
            input_values=on_cpu(nodes.input_values),
            cache_values=on_device(nodes.cache_values),
        )


@dataclass(frozen=True)
class PrologueNodes:
    """Nodes whose values the programs of a prologue return: see ``Prologue``."""

    spans: tuple[Node, ...]
    masks: tuple[Node, ...]
    input_values: tuple[Node, ...]
    cache_values: tuple[Node, ...]


def describe_decoder(
    captured: Captured,
    facts: DecoderFacts,
    recorded: Sequence[StoredSlot],
    groups: tuple[int, ...] = (),
    inputs: Sequence[Node] | None = None,
) -> Decoder:
    """Describe a captured graph whose encoder features are inputs.

    Args:
        captured, facts: the graph after clean-up, and its analysis.
        recorded: the slots that its programs record.
        groups: ``DecoderSpec.layer_groups``.
        inputs: the inputs that callers pass, in order; by default all. Weights may be left out.

    Raises:
        UnsupportedGraphError: the values on which rows depend, or the keys of the call, are unknown.
    """
    inputs = captured.placeholders if inputs is None else inputs
    index = {node: number for number, node in enumerate(inputs)}
    computation, masks = computation_of(captured, facts), find_masks(facts, index)
    spec = DecoderSpec(
        num_layers=facts.num_layers,
        layer_groups=groups,
        num_outputs=captured.num_outputs,
        num_results=captured.num_results,
        writes=captured.writes,
        data=_among(captured.inputs_of(InputKind.DATA), index),
        host_inputs=_among(filter(is_integral, captured.inputs_of(InputKind.DATA)), index),
        tail=_tail(captured, facts, index),
        tail_varies=facts.tail_rows.varies,
        has_past=bool(facts.past),
        rows=_rows(facts, recorded),
        layout=_layout(facts, recorded),
        computation=computation.digests,
        weights=_among(facts.weights, index),
        other_weights=_among(computation.weights, index),
        model_fingerprint=None,
        spans=span_spec(facts, index),
        leaves=input_value_specs(computation.leaves, index),
        masks=masks.spec,
        states=_states(facts),
        reads_states=any(state.recurrence.state is not None for state in facts.states)
        or any(tail.convolution.before is not None for tail in facts.tails),
        most_inputs=tuple(
            (index[tail.convolution.before], tail.convolution.dim, tail.convolution.width)
            for tail in facts.tails
            if tail.convolution.before in index
        ),
    )
    return Decoder(captured, facts, spec, computation, masks)


def _among(nodes: Iterable[Node], index: Mapping[Node, int]) -> tuple[int, ...]:
    return tuple(index[node] for node in nodes if node in index)


def _tail(captured: Captured, facts: DecoderFacts, index: Mapping[Node, int]) -> RowSelection | None:
    rule = facts.tail_rows.rule
    if rule is None:
        return None
    return rule.moved({i: index[node] for i, node in enumerate(captured.placeholders) if node in index})


def _rows(facts: DecoderFacts, recorded: Sequence[StoredSlot]) -> dict[StoredSlot, RowSpec]:
    nodes: dict[StoredSlot, tuple[Node, int]] = {
        frontier.slot: (frontier.node, frontier.dim) for frontier in facts.frontiers
    }
    nodes[Residual()] = (facts.stream.boundaries[-1], facts.tail_rows.axis)
    batch = facts.batch_dims or {}
    return {slot: _row_spec(*nodes[slot], batch.get(nodes[slot][0])) for slot in recorded if slot in nodes}


def _states(facts: DecoderFacts) -> tuple[StateSpec, ...]:
    """Return what donors store of convolutions and recurrences."""
    found: list[StateSpec] = []
    for tail in facts.tails:
        value = tail.convolution.source.meta["val"]
        sizes = (1, int(value.shape[1]), tail.convolution.width)
        found.append(StateSpec(tail.slot, str(value.dtype).removeprefix("torch."), sizes))
    for state in facts.states:
        heads, keys, values = state.recurrence.state_sizes
        dtype = str(state.recurrence.dtype).removeprefix("torch.")
        layer, index = state.layer, state.slot.index
        found += [
            StateSpec(state.slot, dtype, (heads, keys, values)),
            StateSpec(Factor(layer, index), dtype, (None, heads, keys, keys)),
            StateSpec(Term(layer, index), dtype, (None, heads, keys, values)),
        ]
    return tuple(sorted(found, key=lambda spec: spec.slot.layer))  # type: ignore[attr-defined]


def _row_spec(node: Node, dim: int, batch_dim: int | None) -> RowSpec:
    """Return the spec of a node's rows along ``dim``."""
    value = node.meta["val"]
    sizes: list[int | None] = [size if isinstance(size, int) else None for size in value.shape]
    sizes[dim] = None
    if batch_dim is not None:
        sizes[batch_dim] = 1
    return RowSpec(dim, str(value.dtype).removeprefix("torch."), tuple(sizes), batch_dim)


def _layout(facts: DecoderFacts, recorded: Sequence[StoredSlot]) -> str:
    """Return text for the dtypes and widths of stored keys and values."""
    nodes = {frontier.slot: frontier.node for frontier in facts.frontiers}
    slots = [slot for slot in recorded if slot in nodes]
    rows = [(str(slot), str(nodes[slot].meta["val"].dtype), str(shape_of(nodes[slot])[-1])) for slot in slots]
    states = [(str(spec.slot), spec.dtype, spec.sizes) for spec in _states(facts)]
    return str([*rows, *states])
