"""The K/V frontier, the last tensors before positions enter, and the parts of a layer around it.

*Position taint* is everything that depends on the request but not on the residual stream: position ids, cos
and sin, aranges. K is stored at the nearest common dominator of all untainted tensors that a tainted operator
reads on the way to the K operand (rotary embeddings read k and slices of it), moved back over operators that
change no value: layout, casts to a wider dtype, views as complex numbers. So the stored K is free of
positions for any position scheme.

A layer may also carry a state from token to token, beside its attention or in place of it. Its recurrences
and convolutions run on the rows whose keys and values are computed, since each row of theirs needs the rows
before.

Operators that must run on all tokens are tainted too: those that mix tokens, and readers of graph outputs. A
quantised cache has both: scales over all tokens, and integers that it returns and reads back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from vlcache_fx.analysis.attention.sites import Site
from vlcache_fx.analysis.decoder.states import check_states
from vlcache_fx.analysis.recurrences import Convolution, Mixer, Recurrence, is_state
from vlcache_fx.analysis.tokens.axis import TokenAxis, stream_dim
from vlcache_fx.analysis.tokens.follow import follow_tokens
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir.dataflow import (
    NodeSet,
    ancestors,
    articulation_points,
    data_inputs,
    descendants,
)
from vlcache_fx.ir.nodes import LAYOUT, is_full_slice, packet_of
from vlcache_fx.ir.refusal import refuse

aten = torch.ops.aten

INDEX_GENERATORS = frozenset({aten.arange})


@dataclass(frozen=True)
class LayerSplit:
    """One decoder layer, split by the rows that its nodes run on.

    Attributes:
        site: the layer's attention call; None if it has recurrences or convolutions alone.
        key_frontier, value_frontier: tensors at which K and V are stored and spliced; None if the layer reads
            K and V of an earlier layer.
        kv_part: the frontiers and the nodes that they need, and all slices of a fused projection; runs on the
            rows whose K/V is recomputed.
        full_part: nodes between the frontiers and the attention call, and those that compute states to
            return; runs on all tokens.
        q_part: queries, attention and MLP; runs on the rows that the next layer needs.
        recurrences, convolutions: the other operators of the layer that mix tokens; in ``kv_part``.
    """

    site: Site | None
    key_frontier: Node | None
    value_frontier: Node | None
    kv_part: NodeSet
    full_part: NodeSet
    q_part: NodeSet
    recurrences: tuple[Recurrence, ...] = ()
    convolutions: tuple[Convolution, ...] = ()


def position_taint(stream: NodeSet, placeholders: list[Node], graph: torch.fx.Graph) -> NodeSet:
    """Return the nodes outside ``stream`` that depend on request data or on an index generator."""
    generators = [node for node in graph.nodes if packet_of(node) in INDEX_GENERATORS]
    return {node: None for node in descendants([*placeholders, *generators]) if node not in stream}


def split_layer(
    mixers: Sequence[Mixer],
    boundaries: tuple[Node, Node],
    members: tuple[Node, ...],
    taint: NodeSet,
    position: dict[Node, int],
) -> LayerSplit:
    """Find the frontiers of a layer and split its members around them.

    Args:
        mixers: the operators of the layer that mix tokens.
        boundaries: the residual that enters the layer, and the one that leaves it.
        members: the layer's nodes, in graph order.
        taint: see ``position_taint``.
        position: of each node in the graph.

    Raises:
        UnsupportedGraphError: POSITION_IN_STREAM, K or V has no position-free tensor inside the layer;
            TOKEN_AXIS_LOST, the parts overlap; TOKEN_MIXING, a recurrence reads attention of its layer, or
            the layer returns other rows than the last inputs of a convolution.
    """
    entering, leaving = boundaries
    sites = [mixer for mixer in mixers if isinstance(mixer, Site)]
    recurrences = tuple(mixer for mixer in mixers if isinstance(mixer, Recurrence))
    convolutions = tuple(mixer for mixer in mixers if isinstance(mixer, Convolution))
    if len(sites) == len(mixers):
        return _split_attention(sites[0], entering, members, taint, position)
    inside = dict.fromkeys(members)
    needed = ancestors([leaving], inside)
    carriers = [mixer.node for mixer in mixers if not isinstance(mixer, Site)]
    carrying = ancestors(carriers, inside)
    for node in members:  # parts of results that are tuples
        is_part = any(parent in carrying and not _is_tensor(parent) for parent in data_inputs(node))
        if is_part and not is_state(node):
            carrying[node] = None
    states = {node: None for node in members if node not in needed}
    site = sites[0] if sites else None
    if site is None:
        check_states(states, convolutions, recurrences, inside | {entering: None})
        rest = {node: None for node in members if node not in carrying and node not in states}
        return LayerSplit(None, None, None, carrying, states, rest, recurrences, convolutions)
    if site.node in carrying:
        raise refuse(Reason.TOKEN_MIXING, site.node, "a recurrence of the same layer reads its result")
    after = descendants(carrying, inside)
    check_states({n: None for n in states if n in after}, convolutions, recurrences, inside)
    kept = tuple(node for node in members if node not in states or node not in after)
    split = _split_attention(site, entering, kept, taint, position)
    kv_part = {**split.kv_part, **carrying}
    return replace(
        split,
        kv_part=kv_part,
        full_part={node: None for node in members if node in split.full_part or node not in kept},
        q_part={node: None for node in split.q_part if node not in kv_part},
        recurrences=recurrences,
        convolutions=convolutions,
    )


def _split_attention(
    site: Site, entering: Node, members: tuple[Node, ...], taint: NodeSet, position: dict[Node, int]
) -> LayerSplit:
    """Split a layer of attention alone; see ``split_layer``."""
    inside = dict.fromkeys(members)
    key, value = (  # None for K/V of an earlier layer, which is spliced there
        _frontier(site, operand, entering, inside, taint, position)
        if operand in inside or operand is entering
        else None
        for operand in (site.key, site.value)
    )
    if key is not None and value is not None and key is not value:
        # Latent attention computes values from what keys are computed from, or keys from values.
        if value in descendants([key], inside):
            value = None
        elif key in descendants([value], inside):
            key = None
    frontiers = [node for node in (key, value) if node is not None]
    if not frontiers:
        return LayerSplit(site, None, None, {}, {}, dict.fromkeys(members))
    kv_part = ancestors(frontiers, inside)
    for node in members:  # queries of a fused projection are split from a node of the kv part
        if any(parent in kv_part and not _is_tensor(parent) for parent in data_inputs(node)):
            kv_part[node] = None
    after = descendants(frontiers, {n: None for n in inside if n is not site.node})
    before_site = ancestors([site.key, site.value], inside)
    full_part = {node: None for node in after if node not in kv_part and node in before_site}
    # Outputs of a cache depend on the full keys and values, but the attention does not depend on them.
    for node in members:
        if node in after and node not in kv_part and node not in full_part:
            parents = [parent for parent in data_inputs(node) if parent in inside or parent is entering]
            if all(parent in full_part or parent in frontiers for parent in parents):
                full_part[node] = None
    q_part = {node: None for node in members if node not in kv_part and node not in full_part}
    for node in full_part:
        for parent in data_inputs(node):
            if (
                (parent in inside or parent is entering)
                and parent not in full_part
                and parent not in frontiers
            ):
                raise refuse(
                    Reason.TOKEN_AXIS_LOST, node, f"keys or values mix with {parent.name} after the frontier"
                )
    for node in q_part:
        if node is not site.node and any(parent in full_part for parent in data_inputs(node)):
            raise refuse(Reason.TOKEN_AXIS_LOST, node, "it reads full keys or values outside the attention")
    return LayerSplit(site, key, value, kv_part, full_part, q_part)


def _frontier(
    site: Site, operand: Node, entering: Node, inside: NodeSet, taint: NodeSet, position: dict[Node, int]
) -> Node:
    path = ancestors([operand], inside)
    tainted: NodeSet = {}
    first: UnsupportedGraphError | None = None  # if the first tainted node mixes tokens
    axes = {entering: TokenAxis(stream_dim(entering))}
    for node in sorted(path, key=position.__getitem__):
        try:
            tainting = _reads_token_table(node, axes)
        except UnsupportedGraphError as refusal:
            tainting, first = True, first if tainted else refusal
        parents = list(data_inputs(node))
        tainting = tainting or any(parent in path and _is_result(parent) for parent in parents)
        if tainting or any(parent in taint or parent in tainted for parent in parents):
            tainted[node] = None
    clean = {node: None for node in path if node not in tainted}
    if operand in clean:
        point = operand
    else:
        edge = [node for node in clean if any(user in tainted for user in node.users)]
        within = {entering: None, **clean}
        points = articulation_points([entering], edge, position, within) if edge else []
        points = [point for point in points if _is_tensor(point)]
        if not points or points[-1] is entering:
            raise first or refuse(
                Reason.POSITION_IN_STREAM, site.node, "positions enter before keys and values are projected"
            )
        point = points[-1]
    return _before_layout(point, clean)


def _reads_token_table(node: Node, axes: dict[Node, TokenAxis]) -> bool:
    """Return True if ``node`` reads a table with a row per token, such as cos sliced from a buffer.

    Such a table depends on positions, even if computed from weights alone. Adds ``node`` to ``axes``.

    Raises:
        UnsupportedGraphError: ``node`` mixes tokens.
    """
    flow = follow_tokens(node, axes)
    axes[node] = flow.axis
    return bool(flow.gathers)


def _is_result(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _before_layout(node: Node, clean: NodeSet) -> Node:
    while packet_of(node) in LAYOUT or packet_of(node) is aten.view_as_complex or _is_widening(node):
        parents = [parent for parent in data_inputs(node) if parent in clean]
        partial = packet_of(node) is aten.slice and not is_full_slice(node)
        if partial or len(parents) != 1 or len(list(data_inputs(node))) != 1:
            break
        node = parents[0]
    return node


def _is_widening(node: Node) -> bool:
    """Return True for a cast to a wider dtype: it changes no value, and the result takes more memory."""
    if packet_of(node) not in (aten.to, aten._to_copy):
        return False
    before, after = (cast.meta["val"] for cast in (node.args[0], node))  # type: ignore[union-attr]
    return bool(
        before.is_floating_point()
        and after.is_floating_point()
        and torch.promote_types(before.dtype, after.dtype) == after.dtype
        and before.device == after.device
    )
