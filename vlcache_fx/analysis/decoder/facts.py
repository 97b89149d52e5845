"""All facts about a decoder graph, or a typed refusal."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch.fx import Graph, Node

from vlcache_fx.analysis.attention.noncanonical import noncanonical_attention
from vlcache_fx.analysis.attention.sites import Site, find_sites
from vlcache_fx.analysis.decoder.batch import check_batch_dims, find_batch_dims
from vlcache_fx.analysis.decoder.kv_caches import CachePath, cache_paths
from vlcache_fx.analysis.decoder.layers import LayerSplit, position_taint, split_layer
from vlcache_fx.analysis.decoder.merge import Deepstack, Merge, find_deepstack, find_merges, sites_after
from vlcache_fx.analysis.decoder.outputs import TailRows, find_tail_rows
from vlcache_fx.analysis.decoder.rows import Carried, check_results, find_carried, follow_rows
from vlcache_fx.analysis.decoder.stream import Stream, find_stream, output_nodes
from vlcache_fx.analysis.recurrences import Convolution, Recurrence, find_mixers
from vlcache_fx.analysis.tokens.axis import TokenAxis, TokenFlow, shape_of, stream_dim
from vlcache_fx.analysis.tokens.follow import follow_tokens
from vlcache_fx.analysis.tokens.mixing import as_mixing, mixing_refusal
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.ir.copies import NodeMap, on_nodes
from vlcache_fx.ir.dataflow import ancestors, carries_data, descendants, positions
from vlcache_fx.ir.nodes import LAYOUT, packet_of
from vlcache_fx.ir.refusal import refuse
from vlcache_fx.ir.sizes import is_one
from vlcache_fx.spec.slots import Inputs, Key, Matrix, StoredSlot, Value


@dataclass(frozen=True)
class Frontier:
    """A stored tensor, ``<layer>.k`` or ``<layer>.v``, with its token dimension."""

    slot: StoredSlot
    layer: int
    node: Node
    dim: int


@dataclass(frozen=True)
class Tail:
    """The input of a convolution, whose last rows before a token are all that it remembers of them."""

    slot: Inputs
    layer: int
    convolution: Convolution


@dataclass(frozen=True)
class State:
    """A recurrence, and the slots of its states and of what spans make of them."""

    slot: Matrix
    layer: int
    recurrence: Recurrence


@dataclass(frozen=True)
class DecoderFacts:
    """Facts about a decoder graph.

    Attributes:
        merges: merges of encoder features into token embeddings; empty if spans can only be marked.
        deepstack: encoder features that are added to the stream of a layer.
        stream: the residual stream and its layers.
        layers: the parts of each layer.
        caches: per layer, the paths of its keys and values to the attention; None if they are of no tokens of
            this call.
        flows: token flow of every node in kv and q parts.
        carried: values that a later layer reads from an earlier one besides the residual.
        tail_rows: rows that results need.
        batch_dims: batch dimension of the nodes that have one; None for a single sample.
        taint: position-dependent nodes outside the stream.
        weights: weight placeholders that keys, values and the last residual depend on, in order of first use.
        encoder: nodes that compute the features from the request's data; empty if features are graph inputs.
    """

    merges: tuple[Merge, ...]
    deepstack: tuple[Deepstack, ...]
    stream: Stream
    layers: tuple[LayerSplit, ...]
    caches: tuple[tuple[CachePath | None, CachePath | None], ...]
    flows: dict[Node, TokenFlow]
    carried: tuple[Carried, ...]
    tail_rows: TailRows
    batch_dims: dict[Node, int] | None
    taint: dict[Node, None]
    weights: tuple[Node, ...]
    encoder: tuple[Node, ...]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The attention sites, at most one per layer."""
        return tuple(layer.site for layer in self.layers if layer.site is not None)

    @property
    def tails(self) -> tuple[Tail, ...]:
        """The inputs of convolutions, layer by layer."""
        return tuple(
            Tail(Inputs(index, number), index, convolution)
            for index, layer in enumerate(self.layers)
            for number, convolution in enumerate(layer.convolutions)
        )

    @property
    def states(self) -> tuple[State, ...]:
        """The recurrences, layer by layer."""
        return tuple(
            State(Matrix(index, number), index, recurrence)
            for index, layer in enumerate(self.layers)
            for number, recurrence in enumerate(layer.recurrences)
        )

    @property
    def frontiers(self) -> tuple[Frontier, ...]:
        """The tensors at which keys and values are stored and spliced, layer by layer."""
        return tuple(
            Frontier(slot(index), index, node, self.flows[node].dim)
            for index, layer in enumerate(self.layers)
            for slot, node in ((Key, layer.key_frontier), (Value, layer.value_frontier))
            if node is not None
        )

    @property
    def past(self) -> frozenset[Node]:
        """Keys, values and states of earlier calls that rows of this call meet; empty without a cache."""
        found = [path for paths in self.caches for path in paths if path is not None]
        states = [tail.convolution.before for tail in self.tails]
        states += [state.recurrence.state for state in self.states]
        return frozenset(
            [
                *(node for path in found for node in path.past),
                *(node for node in states if node is not None),
            ]
        )

    def on(self, nodes: NodeMap) -> "DecoderFacts":
        """Return the facts of a copy of the graph with ``nodes[n]`` for each node ``n``."""
        return on_nodes(self, nodes)

    def without_encoder(self, nodes: NodeMap) -> "DecoderFacts":
        """Return the facts of a copy in which the encoder's results are inputs.

        Of the encoder, ``nodes`` maps these results alone.
        """
        taint = {node: None for node in self.taint if node in nodes}
        return replace(self, encoder=(), taint=taint).on(nodes)


def analyze(captured: Captured) -> DecoderFacts:
    """Analyse a decoder graph, without changing it.

    Raises:
        UnsupportedGraphError: with the node, its source line and the reason.
    """
    graph = captured.graph_module.graph
    data = captured.inputs_of(InputKind.DATA)
    sites = find_sites(graph)
    others = dict(noncanonical_attention(graph))
    if not sites:
        for node, what in others.items():
            raise refuse(Reason.ATTENTION_FORM, node, what)
        raise refuse(Reason.NO_ATTENTION, None, "the graph has no attention call")
    merges = find_merges(graph, sites)
    sites = sites_after(sites, merges)
    mixers = find_mixers(graph, sites, descendants([merges[-1].node]) if merges else None)
    _check_others(graph, others, merges)
    _check_attention(sites)
    try:
        stream = find_stream(graph, mixers, data)
    except UnsupportedGraphError as refusal:
        raise mixing_refusal(graph, merges, sites) or refusal from None
    start = stream.boundaries[0]
    shape = shape_of(start)
    if len(shape) != 3:
        raise refuse(
            Reason.BATCHED, start, f"token embeddings of shape {tuple(shape)}, want [batch, tokens, hidden]"
        )
    position = positions(graph)
    taint = position_taint(stream.nodes, data, graph)
    _check_positions(stream, merges, graph)
    layers = tuple(
        split_layer(inside, boundaries, members, taint, position)
        for inside, boundaries, members in zip(
            stream.mixers, pairwise(stream.boundaries), stream.members, strict=True
        )
    )
    flows = follow_rows(stream, layers)
    carried = find_carried(stream, layers, flows)
    check_results(graph, layers, stream)
    caches = cache_paths(layers, flows, stream.nodes, position)
    deepstack = find_deepstack(graph)
    tail_rows = find_tail_rows(stream.boundaries[-1], stream.tail, stream_dim(stream.boundaries[-1]))
    batch_dims = None
    if not is_one(shape[0]):
        batch_dims = find_batch_dims(stream, layers, tail_rows)
        check_batch_dims(batch_dims, layers, flows, carried)
    return DecoderFacts(
        merges,
        deepstack,
        stream,
        layers,
        caches,
        flows,
        carried,
        tail_rows,
        batch_dims,
        taint,
        _used_weights(graph, captured.inputs_of(InputKind.WEIGHT), stream),
        _encoder_region([*merges, *deepstack]),
    )


def _check_others(graph: Graph, others: dict[Node, str], merges: tuple[Merge, ...]) -> None:
    """Refuse attention of another form in the decoder. Encoders may have it: they run unchanged."""
    if not others:
        return
    needed = ancestors(output_nodes(graph))
    after = descendants([merges[-1].node]) if merges else needed
    for node, what in others.items():
        if node in needed and node in after:
            raise refuse(Reason.ATTENTION_FORM, node, what)


def _is_computed_elsewhere(site: Site) -> bool:
    """Return True if queries, keys and values are inputs, as between two graph breaks."""
    needed = ancestors([site.query, site.key, site.value])
    return all(
        node.op != "call_function" or packet_of(node) in LAYOUT for node in needed if carries_data(node)
    )


def _check_attention(sites: tuple[Site, ...]) -> None:
    if all(_is_computed_elsewhere(site) for site in sites):
        raise refuse(Reason.NO_ATTENTION, sites[0].node, "its keys and values are computed in another graph")
    for site in sites:
        if is_one(shape_of(site.query)[-2]):
            raise refuse(Reason.PAST_KEYS, site.node, "a single query: a decoding step, not a prefill")
        if site.mask is None and not site.is_causal:
            raise refuse(Reason.MASK_FORM, site.node, "tokens attend to later tokens")


def _check_positions(stream: Stream, merges: tuple[Merge, ...], graph: Graph) -> None:
    """Refuse values per token that enter between the last merge and the first layer."""
    if not merges or merges[-1].node is stream.boundaries[0]:
        return
    merged = merges[-1].node
    axes = {merged: TokenAxis(stream_dim(merged))}
    on_the_way = ancestors([stream.boundaries[0]], descendants([merged]))
    for node in graph.nodes:
        if node not in on_the_way or node is merged:
            continue
        try:
            flow = follow_tokens(node, axes)
        except UnsupportedGraphError as refusal:
            raise as_mixing(node, refusal) from None
        axes[node] = flow.axis
        if flow.gathers:
            raise refuse(
                Reason.POSITION_IN_STREAM, node, f"{flow.gathers[0][0].name} enters the token embeddings"
            )


def _used_weights(graph: Graph, weights: list[Node], stream: Stream) -> tuple[Node, ...]:
    before = ancestors([stream.boundaries[0]])
    needed = {node for node in ancestors([stream.boundaries[-1]]) if node not in before}
    used: dict[Node, None] = {}
    candidates = set(weights)
    for node in graph.nodes:
        if node in needed and node.op != "placeholder":
            used.update((parent, None) for parent in node.all_input_nodes if parent in candidates)
    return tuple(used)


def _encoder_region(merges: Sequence[Merge | Deepstack]) -> tuple[Node, ...]:
    region: dict[Node, None] = {}
    for merge in merges:
        region.update(
            (node, None)
            for node in ancestors([merge.features])
            if node.op not in ("placeholder", "get_attr") and carries_data(node)
        )
    return tuple(region)
