"""Cross-attention: keys and values that depend on a media item, not on the text."""

from __future__ import annotations

from torch.fx import Node

from vlcache_fx.analysis.attention.sites import Site, find_sites
from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.ir.dataflow import NodeSet, ancestors, carries_data, descendants, reachable
from vlcache_fx.ir.sizes import expressions


def find_cross_attended(captured: Captured) -> tuple[Node, ...]:
    """Return the nodes that depend on cross-attended items and on no other input, sizes included.

    A site is cross-attention if its query depends on data, and its keys and values on other data alone. In
    later layers a query depends on the items too: one such site tells what the items are. Reuse of
    these nodes is exact: they are functions of the item's own inputs. Empty without such a site.
    """
    graph = captured.graph_module.graph
    data = captured.inputs_of(InputKind.DATA)
    attended: NodeSet = {}
    for site in find_sites(graph):
        attended.update(_attended_inputs(site, data))
    if not any(node.meta["val"].is_floating_point() for node in attended):
        return ()
    sizes = {size for node in attended for size in expressions(shape_of(node))}
    foreign = [node for node in data if node not in attended]
    foreign += [
        node for node in captured.inputs_of(InputKind.SIZE) if expressions([node.meta["val"]])[0] not in sizes
    ]
    others = reachable(foreign, lambda node: node.users)  # through sizes too
    dependent = descendants(attended)
    return tuple(
        node for node in dependent if node.op == "call_function" and carries_data(node) and node not in others
    )


def _attended_inputs(site: Site, data: list[Node]) -> NodeSet:
    """Return the data that keys and values depend on, if the query depends on other data alone; else nothing.

    Queries of self-attention may depend on more than their keys do: some models scale them by position.
    """
    for_query, for_keys = ancestors([site.query]), ancestors([site.key, site.value])
    keys = {node: None for node in data if node in for_keys}
    queries = [node for node in data if node in for_query]
    return keys if queries and not any(node in keys for node in queries) else {}
