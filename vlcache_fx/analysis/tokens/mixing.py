"""Refusals of decoders in which an operator other than attention mixes tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Graph, Node

from vlcache_fx.analysis.attention.sites import Site
from vlcache_fx.analysis.decoder.merge import Merge
from vlcache_fx.analysis.tokens.axis import Axes, TokenAxis, rank_of
from vlcache_fx.analysis.tokens.follow import follow_tokens
from vlcache_fx.errors import Reason, UnsupportedGraphError
from vlcache_fx.ir.dataflow import NodeSet, ancestors, carries_data, descendants
from vlcache_fx.ir.refusal import refuse


def mixing_refusal(
    graph: Graph, merges: Sequence[Merge], sites: Sequence[Site]
) -> UnsupportedGraphError | None:
    """Return the refusal of the first operator after the merges that mixes tokens on the way to attention.

    None without a merge or such an operator.
    """
    if not merges:
        return None
    start = merges[-1].node
    axes: dict[Node, TokenAxis] = {start: TokenAxis(rank_of(start) - 2)}
    attended = {site.node: site for site in sites}
    on_the_way: NodeSet = ancestors([site.node for site in sites], descendants([start]))
    for node in graph.nodes:
        if node not in on_the_way or node is start or not carries_data(node):
            continue
        if node in attended:
            axes[node] = TokenAxis(rank_of(node) - 2)
            continue
        found = _mixes(node, axes)
        if found is not None:
            return found
    return None


def _mixes(node: Node, axes: dict[Node, TokenAxis]) -> UnsupportedGraphError | None:
    try:
        axes[node] = follow_tokens(node, _operand_axes(node, axes)).axis
    except UnsupportedGraphError as error:
        return as_mixing(node, error)
    return None


def as_mixing(node: Node, refusal: UnsupportedGraphError) -> UnsupportedGraphError:
    """Return the TOKEN_MIXING refusal for a lost token axis at ``node``, which is not attention."""
    if refusal.reason is not Reason.TOKEN_AXIS_LOST:
        return refusal
    return refuse(
        Reason.TOKEN_MIXING, node, f"{node.target} mixes tokens outside attention: {refusal.detail}"
    )


def _operand_axes(node: Node, axes: dict[Node, TokenAxis]) -> Axes:
    return {operand: axes[operand] for operand in node.all_input_nodes if operand in axes}
