"""The residual stream: its start, and the first and last node of each decoder layer.

Layer boundaries are articulation points of the dataflow between consecutive mixers (attention, recurrences,
convolutions), so the search does not depend on parallel or sequential blocks, norm placement or module
layout. Mixers without a boundary between them share a layer: a convolution in front of a recurrence, or
attention beside one.
"""

from dataclasses import dataclass

from torch.fx import Graph, Node

from vlcache_fx.analysis.attention.sites import Site
from vlcache_fx.analysis.decoder.kv_caches import sources_of_rows
from vlcache_fx.analysis.decoder.merge import MERGE_OPS, SCATTER_ROWS
from vlcache_fx.analysis.recurrences import Mixer, rows_after
from vlcache_fx.analysis.tokens.axis import rank_of, shape_of
from vlcache_fx.errors import Reason
from vlcache_fx.ir.dataflow import (
    NodeSet,
    ancestors,
    articulation_points,
    carries_data,
    data_users,
    descendants,
    in_graph_order,
    positions,
)
from vlcache_fx.ir.refusal import refuse

EMBEDDINGS = 3
"""Dimensions of token embeddings, [batch, tokens, hidden]. Several residual streams may be stacked."""


@dataclass(frozen=True)
class Stream:
    """The residual stream of the decoder.

    Attributes:
        boundaries: L + 1 nodes for L layers: ``boundaries[0]`` is the merged token embeddings,
            ``boundaries[i]`` the residual that enters layer i, ``boundaries[L]`` the last layer's result.
        members: per layer, the nodes after its entering boundary up to and including its leaving boundary, in
            graph order.
        tail: the nodes after the last boundary, in graph order.
        nodes: the embeddings and everything computed from them.
        mixers: per layer, the operators that mix tokens, in graph order.
    """

    boundaries: tuple[Node, ...]
    members: tuple[tuple[Node, ...], ...]
    tail: tuple[Node, ...]
    nodes: NodeSet
    mixers: tuple[tuple[Mixer, ...], ...]


def _floating(node: Node) -> bool:
    value = node.meta.get("val")
    return value is not None and not isinstance(value, tuple | list) and value.is_floating_point()


def output_nodes(graph: Graph) -> list[Node]:
    """Return the tensors that the graph returns."""
    output = graph.output_node()
    return [node for node in output.all_input_nodes if carries_data(node)]


def find_stream(graph: Graph, mixers: tuple[Mixer, ...], data_placeholders: list[Node]) -> Stream:
    """Find the residual stream through ``mixers``.

    Args:
        graph: the IR.
        mixers: the operators of the decoder that mix tokens, in graph order.
        data_placeholders: the inputs of kind DATA.

    Raises:
        UnsupportedGraphError: NO_STREAM, if no single tensor is the residual between two attention sites.
    """
    position = positions(graph)
    start = _find_start(graph, mixers[0], mixers[-1], data_placeholders, position)
    stream = descendants([start])
    after_last = rows_after(mixers[-1].node)
    results = [node for node in output_nodes(graph) if node in after_last]
    if not results:
        raise refuse(Reason.NO_STREAM, mixers[-1].node, "no output depends on the last attention")
    boundaries: list[Node] = []
    groups: list[list[Mixer]] = []
    origin = start
    for mixer in mixers:
        # From the previous mixer, not from the start: inputs of layers besides the residual, such as an
        # embedding for each layer, bypass every node.
        points = articulation_points([origin], results, position, stream)
        before = ancestors([mixer.node], stream)
        inner = [point for point in points if point in before and point not in (mixer.node, origin)]
        if origin is start:  # several streams may be stacked behind the embeddings: that is part of the layer
            inner = [start, *(point for point in inner if rank_of(point) == rank_of(start))]
        if boundaries and not (isinstance(mixer, Site) and isinstance(groups[-1][-1], Site)):
            # Within a layer, all paths from a mixer may meet before the residual joins them.
            through = set(articulation_points([boundaries[-1]], results, position, stream))
            inner = [point for point in inner if point in through and point is not boundaries[-1]]
            if not inner:
                groups[-1].append(mixer)
                origin = mixer.node
                continue
        if not inner or (boundaries and inner[-1] is boundaries[-1]):
            raise refuse(
                Reason.NO_STREAM, mixer.node, "no single residual tensor enters the layer of this attention"
            )
        boundaries.append(inner[-1])
        groups.append([mixer])
        origin = mixer.node
    after = articulation_points([origin], results, position, stream)
    after = [point for point in after if point is not origin]
    if not isinstance(groups[-1][-1], Site):
        through = set(articulation_points([boundaries[-1]], results, position, stream))
        after = [point for point in after if point in through]
    boundaries.append(_last_boundary(after, boundaries, stream, position, mixers[-1].node))
    return _split(boundaries, stream, position, groups)


def _find_start(
    graph: Graph, first: Mixer, last: Mixer, data_placeholders: list[Node], position: dict[Node, int]
) -> Node:
    value, query = (first.value, first.query) if isinstance(first, Site) else (first.sources[0],) * 2
    # Contents of a cache are no source of the embeddings: queries do not depend on them.
    needed, query_sources = sources_of_rows(value), ancestors([query])
    sources = [node for node in data_placeholders if node in needed and node in query_sources]
    if not isinstance(first, Site):
        # A mask of padding may be multiplied with the inputs of such a layer: it is no source of embeddings.
        merged = [node for node in graph.nodes if node in needed and node.target in MERGE_OPS]
        sources = merged[-1:] or [node for node in sources if _floating(node)] or sources
    dependent = descendants(sources, needed)
    # Deepstack features come from the encoder, not from the embeddings.
    without_deepstack = {node: None for node in graph.nodes if node.target is not SCATTER_ROWS}
    useful = ancestors([*output_nodes(graph), last.node], without_deepstack)
    candidates = articulation_points(sources, [value], position, dependent)
    plain = [
        candidate for candidate in candidates if _floating(candidate) and rank_of(candidate) == EMBEDDINGS
    ]
    for candidate in (*reversed(plain), *reversed(candidates)):
        before = ancestors([candidate])
        leaks = (
            user
            for node in before
            if node is not candidate and node in dependent and _floating(node)
            for user in data_users(node)
            if user in useful and user not in before
        )
        if _floating(candidate) and next(leaks, None) is None:
            return candidate
    raise refuse(Reason.NO_STREAM, first.node, "no single tensor of token embeddings enters the first layer")


def _last_boundary(
    points: list[Node], boundaries: list[Node], stream: NodeSet, position: dict[Node, int], site: Node
) -> Node:
    """Return the end of the last layer: after the operations of the previous layer, or its last sum."""
    if len(boundaries) > 1:
        pattern = _operations(boundaries[-2], boundaries[-1], stream, position)
        for point in points:
            if _operations(boundaries[-1], point, stream, position) == pattern:
                return point
    shape = [str(size) for size in shape_of(boundaries[0])]
    sums = [
        point
        for point in points
        if sum(parent in stream for parent in point.all_input_nodes) > 1
        and [str(size) for size in shape_of(point)] == shape
        and (descendants([boundaries[-1]], stream).keys() & set(point.all_input_nodes))
    ]
    if not sums:
        raise refuse(Reason.NO_STREAM, site, "the residual stream is lost after the last attention")
    return sums[-1]


def _operations(first: Node, last: Node, stream: NodeSet, position: dict[Node, int]) -> list[str]:
    between = ancestors([last], descendants([first], stream))
    return [str(node.target) for node in in_graph_order(between, position) if node is not first]


def _split(
    boundaries: list[Node], stream: NodeSet, position: dict[Node, int], groups: list[list[Mixer]]
) -> Stream:
    reach = [descendants([boundary], stream) for boundary in boundaries]
    members = []
    for index, leaving in enumerate(boundaries[1:]):
        inside = {n: None for n in reach[index] if n not in reach[index + 1] and n is not boundaries[index]}
        members.append(tuple(in_graph_order([*inside, leaving], position)))
    tail = [node for node in reach[-1] if node is not boundaries[-1]]
    ordered = tuple(in_graph_order(tail, position))
    return Stream(tuple(boundaries), tuple(members), ordered, stream, tuple(map(tuple, groups)))
