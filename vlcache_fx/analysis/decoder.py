"""All facts about one traced VLM graph, or a typed refusal."""

from dataclasses import dataclass

from torch.fx import Graph, Node

from vlcache_fx.analysis.dataflow import ancestors, carries_data, descendants, positions
from vlcache_fx.analysis.frontier import LayerParts, position_taint, split_layer
from vlcache_fx.analysis.merge import Merge, find_merges, sites_behind
from vlcache_fx.analysis.outputs import TailRows, find_tail_rows
from vlcache_fx.analysis.past import CachePath, cache_path
from vlcache_fx.analysis.refusal import refuse
from vlcache_fx.analysis.sites import Site, find_sites
from vlcache_fx.analysis.stream import Stream, find_stream, output_nodes
from vlcache_fx.analysis.token_axis import RowStep, is_one, row_step, shape_of
from vlcache_fx.capture import Captured, InputKind
from vlcache_fx.errors import Reason


@dataclass(frozen=True)
class DecoderFacts:
    """What analysis found out about a decoder graph.

    Attributes:
        merges: where encoder features enter (empty where spans can only be marked).
        stream: the residual stream and its layers.
        layers: each layer's parts.
        caches: per layer, the ways of its keys and of its values to the attention.
        steps: row treatment of every node in kv and q parts.
        tail_rows: which rows results need.
        taint: position-dependent nodes outside the stream.
        weights: weight placeholders that keys, values and the last residual depend on, in order of first use.
        encoder: nodes that compute the features from the request's data (empty where features are graph
            inputs).
    """

    merges: tuple[Merge, ...]
    stream: Stream
    layers: tuple[LayerParts, ...]
    caches: tuple[tuple[CachePath, CachePath], ...]
    steps: dict[Node, RowStep]
    tail_rows: TailRows
    taint: dict[Node, None]
    weights: tuple[Node, ...]
    encoder: tuple[Node, ...]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, which is the number of attention sites."""
        return len(self.layers)

    @property
    def past(self) -> frozenset[Node]:
        """What keys and values of this call are joined with; empty without a cache that may hold some."""
        return frozenset(node for paths in self.caches for path in paths for node in path.past)


def analyze(captured: Captured) -> DecoderFacts:
    """Analyse a graph; nothing in it is changed.

    Raises:
        UnsupportedGraphError: naming the node, its source line and the reason.
    """
    graph = captured.graph_module.graph
    placeholders = captured.placeholders
    data = [node for node, kind in zip(placeholders, captured.kinds, strict=True) if kind is InputKind.DATA]
    sites = find_sites(graph)
    if not sites:
        raise refuse(Reason.NO_ATTENTION, None, "the graph has no attention call")
    merges = find_merges(graph, sites)
    sites = sites_behind(sites, merges)
    _check_attention(sites)
    stream = find_stream(graph, sites, data)
    start = stream.boundaries[0]
    shape = shape_of(start)
    if len(shape) != 3 or not is_one(shape[0]):
        raise refuse(
            Reason.BATCHED, start, f"token embeddings of shape {tuple(shape)}, want [1, tokens, hidden]"
        )
    position = positions(graph)
    taint = position_taint(stream.nodes, data, graph)
    _check_positions(stream, merges, graph)
    _check_operands(sites, stream)
    layers = tuple(
        split_layer(site, entering, members, taint, position)
        for site, entering, members in zip(sites, stream.boundaries, stream.members, strict=False)
    )
    steps = _follow_rows(stream, layers)
    _check_results(graph, layers, stream)
    caches = tuple(
        (
            cache_path(
                layer.key_frontier, steps[layer.key_frontier].axis, layer.site.key, layer.full_part, position
            ),
            cache_path(
                layer.value_frontier,
                steps[layer.value_frontier].axis,
                layer.site.value,
                layer.full_part,
                position,
            ),
        )
        for layer in layers
    )
    weights = [
        node for node, kind in zip(placeholders, captured.kinds, strict=True) if kind is InputKind.WEIGHT
    ]
    return DecoderFacts(
        merges,
        stream,
        layers,
        caches,
        steps,
        find_tail_rows(stream.boundaries[-1], stream.tail, len(shape) - 2),
        taint,
        _used_weights(graph, weights, stream),
        _encoder_region(merges),
    )


def _check_attention(sites: tuple[Site, ...]) -> None:
    for site in sites:
        if is_one(shape_of(site.query)[-2]):
            raise refuse(Reason.PAST_KEYS, site.node, "a single query: a decoding step, no prefill")
        if site.mask is None and not site.is_causal:
            raise refuse(
                Reason.MASK_FORM, site.node, "every token attends to every other, later ones included"
            )


def _check_operands(sites: tuple[Site, ...], stream: Stream) -> None:
    for site, entering, members in zip(sites, stream.boundaries, stream.members, strict=False):
        own = {entering, *members}
        for operand in (site.key, site.value):
            if own.isdisjoint(ancestors([operand])):
                raise refuse(
                    Reason.FOREIGN_KEYS, site.node, f"{operand.name} is not computed from the layer's tokens"
                )


def _check_positions(stream: Stream, merges: tuple[Merge, ...], graph: Graph) -> None:
    """Between the last merge and the first layer, nothing may enter that differs from token to token."""
    if not merges or merges[-1].node is stream.boundaries[0]:
        return
    merged = merges[-1].node
    axes = {merged: len(shape_of(merged)) - 2}
    on_the_way = ancestors([stream.boundaries[0]], descendants([merged]))
    for node in graph.nodes:
        if node not in on_the_way or node is merged:
            continue
        step = row_step(node, axes)
        axes[node] = step.axis
        if step.gathers:
            raise refuse(
                Reason.POSITION_IN_STREAM, node, f"{step.gathers[0][0].name} enters the token embeddings"
            )


def _follow_rows(stream: Stream, layers: tuple[LayerParts, ...]) -> dict[Node, RowStep]:
    steps: dict[Node, RowStep] = {}
    axes = {stream.boundaries[0]: len(shape_of(stream.boundaries[0])) - 2}
    for layer, members in zip(layers, stream.members, strict=True):
        for node in members:
            if node in layer.full_part:
                continue
            step = _attention_step(layer.site, axes) if node is layer.site.node else row_step(node, axes)
            steps[node] = step
            axes[node] = step.axis
    for before, boundary in zip(stream.boundaries, stream.boundaries[1:], strict=False):
        if axes[boundary] != axes[before]:
            raise refuse(Reason.TOKEN_AXIS_LOST, boundary, "the layer returns its tokens along another axis")
    return steps


def _attention_step(site: Site, axes: dict[Node, int]) -> RowStep:
    rank = len(shape_of(site.node))
    if axes.get(site.query) != rank - 2:
        raise refuse(
            Reason.TOKEN_AXIS_LOST, site.node, "the tokens of its query are not in its last but one dimension"
        )
    if site.mask is None:
        return RowStep(rank - 2)
    size = shape_of(site.mask)
    if site.mask in axes or len(size) < 2:
        raise refuse(Reason.MASK_FORM, site.node, f"a mask of shape {tuple(size)} cannot be cut to rows")
    return RowStep(rank - 2, () if is_one(size[-2]) else ((site.mask, len(size) - 2),))


def _check_results(graph: Graph, layers: tuple[LayerParts, ...], stream: Stream) -> None:
    partial = {node for layer in layers for node in (*layer.q_part, *layer.kv_part)}
    partial -= {stream.boundaries[-1]}
    partial -= {node for layer in layers for node in (layer.key_frontier, layer.value_frontier)}
    for node in output_nodes(graph):
        if node in partial:
            raise refuse(
                Reason.TOKEN_AXIS_LOST,
                node,
                "the graph returns it with a row for every token of an inner layer",
            )


def _used_weights(graph: Graph, weights: list[Node], stream: Stream) -> tuple[Node, ...]:
    before = ancestors([stream.boundaries[0]])
    needed = {node for node in ancestors([stream.boundaries[-1]]) if node not in before}
    used: dict[Node, None] = {}
    known = set(weights)
    for node in graph.nodes:
        if node in needed and node.op != "placeholder":
            used.update((parent, None) for parent in node.all_input_nodes if parent in known)
    return tuple(used)


def _encoder_region(merges: tuple[Merge, ...]) -> tuple[Node, ...]:
    region: dict[Node, None] = {}
    for merge in merges:
        region.update(
            (node, None)
            for node in ancestors([merge.features])
            if node.op not in ("placeholder", "get_attr") and carries_data(node)
        )
    return tuple(region)
