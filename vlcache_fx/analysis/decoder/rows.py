"""Rows of every node of the decoder's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from vlcache_fx.analysis.attention.sites import Site
from vlcache_fx.analysis.decoder.layers import LayerSplit
from vlcache_fx.analysis.decoder.stream import Stream, output_nodes
from vlcache_fx.analysis.tokens.axis import Axes, TokenAxis, TokenFlow, shape_of, stream_dim
from vlcache_fx.analysis.tokens.follow import follow_tokens
from vlcache_fx.analysis.tokens.mixing import as_mixing
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir.dataflow import ancestors, data_inputs
from vlcache_fx.ir.refusal import refuse
from vlcache_fx.ir.sizes import is_one


@dataclass(frozen=True)
class Carried:
    """A value of a layer that a later layer reads besides the residual.

    Attributes:
        operand: the value.
        reader: the node of the later layer.
        dim: the operand's token dimension.
        made_at, read_at: levels of the rows of ``operand`` and ``reader``: 0 to L, as in ``Plan.rows``.
    """

    operand: Node
    reader: Node
    dim: int
    made_at: int
    read_at: int


def follow_rows(stream: Stream, layers: Sequence[LayerSplit]) -> dict[Node, TokenFlow]:
    """Return the token flow of every node in kv and q parts.

    Raises:
        UnsupportedGraphError: a node mixes tokens, or a layer returns tokens along another axis.
    """
    flows: dict[Node, TokenFlow] = {}
    axes = {stream.boundaries[0]: TokenAxis(stream_dim(stream.boundaries[0]))}
    for layer, members in zip(layers, stream.members, strict=True):
        for node in members:
            if node in layer.full_part:
                continue
            site = layer.site
            is_site = site is not None and node is site.node
            flow = _attention_flow(site, axes) if site is not None and is_site else _flow(node, axes)
            flows[node] = flow
            axes[node] = flow.axis
    for boundary in stream.boundaries[1:]:
        if axes[boundary].dim != stream_dim(boundary) or not axes[boundary].entries.are_tokens:
            raise refuse(Reason.TOKEN_AXIS_LOST, boundary, "the layer returns its tokens along another axis")
    return flows


def _flow(node: Node, axes: Axes) -> TokenFlow:
    try:
        return follow_tokens(node, axes)
    except UnsupportedGraphError as refusal:
        raise as_mixing(node, refusal) from None


def _attention_flow(site: Site, axes: Axes) -> TokenFlow:
    rank = len(shape_of(site.node))
    axis = axes.get(site.query)
    if axis is None:
        _follow_to(site.query, axes)
    if axis is None or axis.dim != rank - 2 or not axis.entries.are_tokens:
        raise refuse(Reason.TOKEN_AXIS_LOST, site.node, "the query's token dimension is not -2")
    if site.mask is None:
        return TokenFlow(TokenAxis(rank - 2))
    size = shape_of(site.mask)
    if site.mask in axes or len(size) < 2:
        raise refuse(Reason.MASK_FORM, site.node, f"a mask of shape {tuple(size)} cannot be cut to rows")
    return TokenFlow(TokenAxis(rank - 2), () if is_one(size[-2]) else ((site.mask, len(size) - 2),))


def _follow_to(query: Node, axes: Axes) -> None:
    """Refuse the operator on the way to a query at which the rows are lost, if there is one."""
    known = dict(axes)
    path = ancestors([query], {node: None for node in query.graph.nodes if node not in axes})
    for node in query.graph.nodes:
        if node in path and any(operand in known for operand in data_inputs(node)):
            known[node] = _flow(node, known).axis


def find_carried(
    stream: Stream, layers: Sequence[LayerSplit], flows: dict[Node, TokenFlow]
) -> tuple[Carried, ...]:
    """Return the values that a later layer reads from an earlier one besides the residual.

    Full keys and values that later layers share are not among them: they have all tokens.

    Raises:
        UnsupportedGraphError: TOKEN_AXIS_LOST, if rows of one layer would meet all tokens, or the tail reads
            rows of an inner layer.
    """
    levels = _levels(stream, layers)
    full = {node for layer in layers for node in layer.full_part}
    found = []
    for index, (layer, members) in enumerate(zip(layers, stream.members, strict=True)):
        entering = stream.boundaries[index]
        for node in members:
            for operand in data_inputs(node):
                if operand not in levels or operand is entering or operand in members:
                    continue
                if layer.site is not None and node is layer.site.node and operand is not layer.site.query:
                    continue  # shared keys and values are spliced later
                if node in full:
                    raise refuse(
                        Reason.TOKEN_AXIS_LOST,
                        node,
                        f"keys or values mix with {operand.name} of another layer",
                    )
                flow = flows.get(operand)
                axis = TokenAxis(stream_dim(operand)) if flow is None else flow.axis
                if not axis.entries.are_tokens:
                    raise refuse(Reason.TOKEN_AXIS_LOST, node, f"{operand.name} comes from another layer")
                found.append(Carried(operand, node, axis.token_dim, levels[operand], levels[node]))
    inner = {node for node in levels if node is not stream.boundaries[-1]}
    for node in stream.tail:
        for operand in data_inputs(node):
            if operand in inner:
                raise refuse(Reason.TOKEN_AXIS_LOST, node, f"it reads {operand.name} of an inner layer")
    return tuple(found)


def _levels(stream: Stream, layers: Sequence[LayerSplit]) -> dict[Node, int]:
    """Return the level of each node's rows, if the last layer of a row computes only keys and values."""
    levels = {stream.boundaries[0]: 0}
    for index, layer in enumerate(layers):
        levels.update(dict.fromkeys(layer.kv_part, index))
        levels.update(dict.fromkeys(layer.q_part, index + 1))
    return levels


def check_results(graph: Graph, layers: Sequence[LayerSplit], stream: Stream) -> None:
    """Check that the graph returns no rows of inner layers, besides full keys and values.

    Raises:
        UnsupportedGraphError: TOKEN_AXIS_LOST, otherwise.
    """
    partial = {node for layer in layers for node in (*layer.q_part, *layer.kv_part)}
    partial -= {stream.boundaries[-1]}
    partial -= {node for layer in layers for node in (layer.key_frontier, layer.value_frontier) if node}
    for node in output_nodes(graph):
        if node in partial:
            raise refuse(
                Reason.TOKEN_AXIS_LOST,
                node,
                "the graph returns it, with the rows of an inner layer",
            )
