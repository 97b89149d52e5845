"""Merges of encoder features into token embeddings, and deepstack features of later layers."""

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

import vlcache_fx.ops  # noqa: F401  (defines torch.ops.vlcache)
from vlcache_fx.analysis.attention.noncanonical import noncanonical_attention
from vlcache_fx.analysis.attention.sites import Site, find_sites
from vlcache_fx.analysis.tokens.axis import shape_of
from vlcache_fx.ir.dataflow import ancestors, descendants

SCATTER_ROWS = torch.ops.vlcache.scatter_rows.default
MERGE_OPS = frozenset({torch.ops.aten.masked_scatter.default})
"""Operators that replace token embeddings by features."""


@dataclass(frozen=True)
class Merge:
    """A merge: ``embeddings`` with rows of ``features``, in order, where ``mask`` is true.

    With mask 0 1 1 0: e0 f0 f1 e3.

    Attributes:
        node: the call; [batch, tokens, hidden].
        embeddings: the token embeddings, of the same shape.
        mask: bool, broadcastable to the embeddings; constant along the last dimension.
        features: rows of the encoder's output, [items' rows, hidden] (or any shape with the same elements).
    """

    node: Node
    embeddings: Node
    mask: Node
    features: Node


def find_merges(graph: Graph, sites: tuple[Site, ...]) -> tuple[Merge, ...]:
    """Return the merges that ``sites`` depend on, in graph order (often one per modality).

    A write of rows that are computed from the embeddings is no merge.
    """
    needed = ancestors([site.node for site in sites])
    merges = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target in MERGE_OPS and node in needed:
            embeddings, mask, features = node.args
            assert isinstance(embeddings, Node)
            assert isinstance(mask, Node)
            assert isinstance(features, Node)
            if embeddings not in ancestors([features]):
                merges.append(Merge(node, embeddings, mask, features))
    return tuple(merges)


@dataclass(frozen=True)
class Deepstack:
    """Features that are added to the residual stream of a layer where ``mask`` is true.

    Attributes:
        node: the features where ``mask`` is true, zeros elsewhere; [batch, tokens, hidden].
        features: rows of the encoder's output, [items' rows, hidden].
        mask: bool [batch, tokens].
    """

    node: Node
    features: Node
    mask: Node


def find_deepstack(graph: Graph) -> tuple[Deepstack, ...]:
    """Return the deepstack features of a graph, in graph order."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target is SCATTER_ROWS:
            features, mask = node.args
            assert isinstance(features, Node)
            assert isinstance(mask, Node)
            found.append(Deepstack(node, features, mask))
    return tuple(found)


@dataclass(frozen=True)
class LoneMerge:
    """A merge in a graph without attention: some models break between the merge and the decoder.

    Attributes:
        output_index: index of the merged embeddings, [batch, tokens, hidden], among the graph's results.
        masks: mask of each merge that they depend on.
    """

    output_index: int
    masks: tuple[Node, ...]


def find_lone_merge(graph: Graph) -> LoneMerge | None:
    """Return the merge of a graph without attention that returns a single merge; else None."""
    results = graph.output_node().args[0]
    assert isinstance(results, tuple | list)
    merged = {
        index: node
        for index, node in enumerate(results)
        if isinstance(node, Node) and node.target in MERGE_OPS
    }
    if len(merged) != 1 or find_sites(graph) or next(noncanonical_attention(graph), None) is not None:
        return None
    ((index, last),) = merged.items()
    if len(shape_of(last)) != 3:
        return None
    needed = ancestors([last])
    masks = [node.args[1] for node in graph.nodes if node in needed and node.target in MERGE_OPS]
    return LoneMerge(index, tuple(mask for mask in masks if isinstance(mask, Node)))


def sites_after(sites: tuple[Site, ...], merges: tuple[Merge, ...]) -> tuple[Site, ...]:
    """Return the decoder's sites: those after the last merge, or all without a merge."""
    if not merges:
        return sites
    after = descendants([merges[-1].node])
    return tuple(site for site in sites if site.node in after)
