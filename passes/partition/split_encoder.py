"""Split the encoder from the rest of a graph, so that a cache hit can skip it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx import Node

import vlcache_fx.ops  # noqa: F401  (defines torch.ops.vlcache)
from vlcache_fx.analysis.attention.sites import find_sites
from vlcache_fx.analysis.randomness import draws_numbers
from vlcache_fx.errors import Reason
from vlcache_fx.ir import Captured, InputKind
from vlcache_fx.ir.copies import NodeMap
from vlcache_fx.ir.dataflow import descendants
from vlcache_fx.ir.digest import computation_digest
from vlcache_fx.ir.nodes import packet_of
from vlcache_fx.ir.refusal import refuse
from vlcache_fx.ir.subgraph import extract, needed_for

aten = torch.ops.aten

COMPUTES = frozenset(
    {aten.linear, aten.matmul, aten.mm, aten.addmm, aten.bmm, aten.conv2d, aten.conv3d, aten.convolution}
    | {aten.scaled_dot_product_attention, torch.ops.vlcache.attend}
)
"""Operators that make a region worth caching."""


@dataclass(frozen=True)
class SplitEncoder:
    """An encoder, and the decoder with its results as inputs.

    Attributes:
        encoder: graph from the original inputs to the tensors that the rest reads.
        inputs: indices of the data inputs (tensors and sizes) that the encoder depends on.
        weights: indices of the encoder's weights.
        computations: per result, a digest of its computation from these inputs.
        decoder: the rest; the encoder's results are data inputs after the original ones.
        nodes: original node -> the decoder's node; a result of the encoder -> the decoder's input.
        computes: False where the region only concatenates or converts features of an encoder outside the
            graph.
    """

    encoder: fx.GraphModule
    inputs: tuple[int, ...]
    weights: tuple[int, ...]
    computations: tuple[str, ...]
    decoder: Captured
    nodes: NodeMap
    computes: bool


def split_encoder(captured: Captured, encoder: Iterable[Node]) -> SplitEncoder | None:
    """Split ``captured``, which is not changed, at the region ``encoder``, which depends on no other data.

    Returns None for an empty region, where features are inputs of the graph.
    """
    region = dict.fromkeys(encoder)
    if not region:
        return None
    results = [
        node for node in region if any(user not in region and user.op != "output" for user in node.users)
    ]
    results += [n for n in region if n not in results and any(user.op == "output" for user in n.users)]
    inputs, weights = _inputs(captured, results)
    decoder, nodes = _rest(captured, results)
    return SplitEncoder(
        encoder=extract(captured.graph_module, results),
        inputs=inputs,
        weights=weights,
        computations=_computations(captured, results, inputs, weights),
        decoder=decoder,
        nodes=nodes,
        computes=any(packet_of(node) in COMPUTES for node in region),
    )


@dataclass(frozen=True)
class SplitResults:
    """A graph of an encoder, split into the results of the encoder and all others.

    Attributes:
        encoder: graph from the original inputs to the encoder's results.
        inputs: indices of the data inputs (tensors and sizes) that the encoder depends on.
        weights: indices of the encoder's weights.
        computations: per result of the encoder, a digest of its computation from these inputs.
        others: graph from the original inputs to the other results.
        encoder_indices, other_indices: output indices of each part's results in the original graph.
        constants: the original results, with None for computed ones.
    """

    encoder: fx.GraphModule
    inputs: tuple[int, ...]
    weights: tuple[int, ...]
    computations: tuple[str, ...]
    others: fx.GraphModule
    encoder_indices: tuple[int, ...]
    other_indices: tuple[int, ...]
    constants: tuple[Any, ...]

    def joined(self, encoded: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        """Return the results of the original graph."""
        results = list(self.constants)
        for indices, values in ((self.encoder_indices, encoded), (self.other_indices, others)):
            for index, value in zip(indices, values, strict=True):
                results[index] = value
        return results


def split_results(captured: Captured) -> SplitResults:
    """Split the results of ``captured`` into those that depend on an attention call and the others."""
    output = captured.graph_module.graph.output_node().args[0]
    assert isinstance(output, tuple | list)
    reached = descendants(site.node for site in find_sites(captured.graph_module.graph))
    computed = {index: value for index, value in enumerate(output) if isinstance(value, Node)}
    encoder = {index: value for index, value in computed.items() if value in reached}
    others = {index: value for index, value in computed.items() if value not in reached}
    inputs, weights = _inputs(captured, list(encoder.values()))
    return SplitResults(
        encoder=extract(captured.graph_module, list(encoder.values())),
        inputs=inputs,
        weights=weights,
        computations=_computations(captured, list(encoder.values()), inputs, weights),
        others=extract(captured.graph_module, list(others.values())),
        encoder_indices=tuple(encoder),
        other_indices=tuple(others),
        constants=tuple(None if isinstance(value, Node) else value for value in output),
    )


def _inputs(captured: Captured, results: Sequence[Node]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the indices of the data and of the weights that ``results`` depend on."""
    needed = needed_for(results)
    used = [index for index, node in enumerate(captured.placeholders) if node in needed]
    data = tuple(index for index in used if captured.kinds[index] is not InputKind.WEIGHT)
    return data, tuple(index for index in used if captured.kinds[index] is InputKind.WEIGHT)


def _computations(
    captured: Captured, results: Sequence[Node], inputs: Sequence[int], weights: Sequence[int]
) -> tuple[str, ...]:
    random = next((node for node in needed_for(results) if draws_numbers(node)), None)
    if random is not None:
        raise refuse(Reason.RANDOM, random, "the encoder draws random numbers")
    names = {captured.placeholders[index]: f"input {number}" for number, index in enumerate(inputs)}
    names |= {captured.placeholders[index]: f"weight {number}" for number, index in enumerate(weights)}
    return tuple(computation_digest(captured.graph_module, result, names) for result in results)


def _rest(captured: Captured, results: list[Node]) -> tuple[Captured, NodeMap]:
    graph = fx.Graph()
    copies: dict[Node, Node] = {}
    last = captured.placeholders[-1]
    inputs = dict.fromkeys(results)
    for node in captured.graph_module.graph.nodes:
        if node not in inputs:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if node is last:
            for index, result in enumerate(results):
                copies[result] = graph.placeholder(f"features_{index}")
                copies[result].meta["val"] = result.meta["val"]
    graph.eliminate_dead_code()
    graph.lint()
    kinds = (*captured.kinds, *[InputKind.DATA] * len(results))
    decoder = replace(captured, graph_module=fx.GraphModule(captured.graph_module, graph), kinds=kinds)
    left = set(graph.nodes)
    return decoder, {node: copy for node, copy in copies.items() if copy in left}
